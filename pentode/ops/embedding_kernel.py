"""A Triton kernel: rows added to those of a table, many to one. Imported only where it runs."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 8  # columns of a program
AT_ONCE = 8  # tokens of one row that are read together


@triton.jit
def _add_rows(
    total: tl.tensor,
    ordered: tl.tensor,
    order: tl.tensor,
    grad: tl.tensor,
    T: tl.tensor,
    D: tl.tensor,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0)
    row = tl.load(ordered + at)
    if row != tl.load(ordered + at - 1, mask=at > 0, other=-1):  # the first of the tokens that name it
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < D
        found = tl.zeros([BLOCK], total.dtype.element_ty)
        own = tl.full([], AT_ONCE, tl.int32)  # of those that were read last, how many name it
        while own == AT_ONCE:
            places = at + tl.arange(0, AT_ONCE)
            named = tl.load(ordered + places, mask=places < T, other=-1) == row
            token = tl.load(order + places, mask=named, other=0)
            part = tl.load(
                grad + token[:, None] * D + column[None, :], mask=named[:, None] & inside[None, :], other=0.0
            )
            found += tl.sum(part.to(total.dtype.element_ty), 0)
            own = tl.sum(named.to(tl.int32), 0)
            at += AT_ONCE
        here = total + row * D + column
        tl.store(here, tl.load(here, mask=inside) + found, mask=inside)


def add_rows_(total: Tensor, rows: Tensor, grad: Tensor) -> None:
    """total[rows] += grad: total [V, D], rows [T] int64, grad [T, D], contiguous, on a GPU.

    With the same bits each time: who names a row is added up in order, in total's dtype, by one program.
    """
    (T, D), (ordered, order) = grad.shape, rows.sort(stable=True)
    _add_rows[(T, triton.cdiv(D, BLOCK))](total, ordered, order, grad, T, D, AT_ONCE, BLOCK, num_warps=WARPS)
