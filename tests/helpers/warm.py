"""Imported once by the server from which tests' processes are forked: what training needs is then there at once."""

import matplotlib.pyplot  # noqa: F401
import torch
import torch.distributed

import pentode.cli
import pentode.generate.closing
import pentode.report.page
import pentode.train.start  # noqa: F401

torch.set_num_threads(1)
