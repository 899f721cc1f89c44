"""Imported once by the server from which tests' processes are forked: what training needs is then there at once.

What torch imports when it is first used counts most: each of eight ranks would spend ten seconds on it.
"""

import matplotlib.pyplot  # noqa: F401
import s3fs  # noqa: F401
import torch
import torch._dynamo
import torch._inductor.compile_fx
import torch.distributed
import torch.distributed.tensor  # torch.testing asks for it
import torch.utils.checkpoint

import pentode.cli
import pentode.generate.closing
import pentode.report.page
import pentode.train.start  # noqa: F401
import tests.helpers.cases  # noqa: F401

torch.set_num_threads(1)
