"""A Triton kernel: a gradient added to a wider sum. Imported only where it runs."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 2048, 8  # elements of a program: 8 a thread, which are 16 bytes in bfloat16


@triton.jit
def _add(total: tl.tensor, part: tl.tensor, N: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    wide = tl.load(part + at, mask=inside).to(total.dtype.element_ty)
    tl.store(total + at, tl.load(total + at, mask=inside) + wide, mask=inside)


def add_(total: Tensor, part: Tensor) -> None:
    """total += part, both contiguous, on a GPU. torch reads tensors of two dtypes element by element."""
    _add[(triton.cdiv(total.numel(), BLOCK),)](total, part, total.numel(), BLOCK, num_warps=WARPS)
