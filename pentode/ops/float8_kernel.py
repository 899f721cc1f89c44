"""A Triton kernel: a matrix to float8, by rows and by columns at once. Imported only where it runs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 128, 64  # of a tile; a column of it is written as 128 bytes in a row


@triton.jit
def _cast(
    x: tl.tensor,
    scale: tl.tensor,
    rowwise: tl.tensor,
    columnwise: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    most: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (m[:, None] < M) & (n[None, :] < N)
    wide = tl.load(x + m[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    narrow = tl.minimum(tl.maximum(wide, -most), most).to(rowwise.dtype.element_ty)
    tl.store(rowwise + m[:, None] * N + n[None, :], narrow, mask=inside)
    tl.store(columnwise + n[:, None] * M + m[None, :], tl.trans(narrow), mask=tl.trans(inside))


def cast_both_ways(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `ops.float8.cast_both_ways`, for x [M, N] contiguous on a GPU."""
    (M, N), most = x.shape, torch.finfo(dtype).max
    rowwise, columnwise = torch.empty_like(x, dtype=dtype), x.new_empty(N, M, dtype=dtype)
    grid = (triton.cdiv(M, ROWS), triton.cdiv(N, COLUMNS))
    _cast[grid](x, scale, rowwise, columnwise, M, N, most, ROWS, COLUMNS, num_warps=8)
    return rowwise, columnwise
