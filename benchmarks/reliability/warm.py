"""Imported once by the server from which workers are forked, so that no rank of a case waits for an import.

The list is what training on a CPU imports, most of it when it is first used.
"""

import torch
import torch._dynamo
import torch._inductor.compile_fx
import torch.distributed
import torch.utils.checkpoint

import pentode.cli
import pentode.config.check
import pentode.generate.closing
import pentode.report.page
import pentode.train.start  # noqa: F401

torch.set_num_threads(1)
