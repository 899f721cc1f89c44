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
        ctx.found, ctx.by_kernel = found, devices.runs_kernels(table)  # backward's thread cannot be asked
        return F.embedding(rows, table)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[None, None, None]:
        (rows,) = ctx.saved_tensors
        total = ctx.found.total
        if not ctx.found.begin():
            total.zero_()
        if ctx.by_kernel:
            from pentode.ops.embedding_kernel import add_rows_

            add_rows_(total, rows, grad.contiguous())
        elif devices.is_gpu(total.device):
            _add_rows_(total, rows, grad)
        else:
            total.index_add_(0, rows, grad.to(total.dtype))
        return None, None, None


def _add_rows_(total: Tensor, rows: Tensor, grad: Tensor) -> None:
    """total[rows] += grad, by torch, on a GPU: with the same bits each time, and soon where many tokens name one row.

    What belongs to one row is added up first, by the kernel of torch's own embedding, which does it in parts; in the
    total's dtype, as the kernel for few tokens rounds each part to what it is given. A row is then named once; places
    that are left over add zeros to some row, which in any order gives the same sum.
    """
    T = rows.shape[0]
    ordered, order = rows.sort()
    place = torch.zeros_like(rows)
    place[1:] = ordered[1:] != ordered[:-1]
    place = place.cumsum(0)
    places, named = torch.empty_like(rows), torch.arange(T, device=rows.device) % total.shape[0]
    places[order], named[place] = place, ordered
    parts = torch.ops.aten.embedding_dense_backward(grad.to(total.dtype), places, T, -1, False)  # [T, D]
    total.index_add_(0, named, parts)
