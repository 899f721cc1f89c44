"""A Triton kernel: the statistics of rows of logits, each read once. Imported only where a GPU runs it."""
# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # of a row, of which a program takes four pieces at a time
LOWEST = tl.constexpr(-3.0e38)  # finite: a difference of two infinities is no number


@triton.jit
def _statistics(
    logits: tl.tensor, top: tl.tensor, total: tl.tensor, V: tl.tensor, held: tl.tensor, COLUMNS: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    most = tl.full([COLUMNS], LOWEST, tl.float32)  # of each lane, and the sum of exponentials below it
    sums = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, held, 4 * COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        a = _piece(logits + row * V, column, held)
        b = _piece(logits + row * V, column + COLUMNS, held)
        c = _piece(logits + row * V, column + 2 * COLUMNS, held)
        d = _piece(logits + row * V, column + 3 * COLUMNS, held)
        higher = tl.maximum(most, tl.maximum(tl.maximum(a, b), tl.maximum(c, d)))
        sums *= tl.exp(most - higher)
        sums += tl.exp(a - higher) + tl.exp(b - higher) + tl.exp(c - higher) + tl.exp(d - higher)
        most = higher
    highest = tl.max(most)
    tl.store(top + row, highest)
    tl.store(total + row, tl.sum(sums * tl.exp(most - highest)))


@triton.jit
def _piece(start: tl.tensor, column: tl.tensor, held: tl.tensor) -> tl.tensor:
    return tl.load(start + column, mask=column < held, other=LOWEST).to(tl.float32)


def statistics(logits: Tensor, held: int) -> tuple[Tensor, Tensor]:
    """As `ops.cross_entropy.Passes.statistics`, for contiguous logits on a GPU, no wider than float32."""
    rows, V = logits.shape
    top, total = logits.new_empty(2, rows, dtype=torch.float32)
    _statistics[(rows,)](logits, top, total, V, held, COLUMNS, num_warps=4)
    return top, total
