"""Rows of a table, and their gradients added to the table's sum."""

# An autograd Function gives its context attributes and its backward a signature that torch's stubs do not know.
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pentode import device as devices
from pentode.ops.gradient_sum import GradientSum, sum_of


def embedding(rows: Tensor, table: Tensor) -> Tensor:
    """The rows [T] int64 of a table [V, D].  # [T, D]"""
    found = sum_of(table)
    return F.embedding(rows, table) if found is None else _SummingEmbedding.apply(rows, table, found)


class _SummingEmbedding(torch.autograd.Function):
    """The same; backward adds to the few rows that were used, and makes no gradient of the whole table."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, table: Tensor, found: GradientSum) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.found = found
        return F.embedding(rows, table)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[None, None, None]:
        (rows,) = ctx.saved_tensors
        total = ctx.found.total
        if not ctx.found.begin():
            total.zero_()
        if devices.is_gpu(total.device):
            total.index_put_((rows,), grad.to(total.dtype), accumulate=True)  # index_add_ adds in any order there
        else:
            total.index_add_(0, rows, grad.to(total.dtype))
        return None, None, None
