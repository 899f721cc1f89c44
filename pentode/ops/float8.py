"""Numbers of 8 bits with a scale: how tensors become float8.

In float8 (arXiv:2209.05433) a number has 4 bits of exponent and 3 of mantissa (E4M3), or 5 and 2 (E5M2). A tensor is
scaled so that its largest magnitude, as a whole or along a dimension, is the largest number there is.
"""

import torch
from torch import Tensor

from pentode import device as devices

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TINY = 1e-12  # a tensor that is all zeros is divided by this


def scaled(x: Tensor, dtype: torch.dtype, *, dim: int) -> tuple[Tensor, Tensor]:
    """x in a float8 dtype, and float32 numbers, one a slice of `dim`, by which it is to be multiplied to be x again."""
    scale = _scale(x.abs().amax(dim, keepdim=True), dtype)
    return _cast(x, scale, dtype), scale.reciprocal()


def scaled_both_ways(x: Tensor, dtype: torch.dtype, *, largest: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, N] in a float8 dtype, its transpose [N, M], both contiguous, and the number (0-d) to multiply them by.

    The hardware multiplies rows by rows, so that a tensor that is an operand of two products is needed both ways.
    `largest` is the largest magnitude in x, 0-d, where that is known.
    """
    if largest is None:
        largest = x.abs().amax(1).amax()  # by rows first: inductor finds those in the pass that makes x
    scale = _scale(largest, dtype)
    rowwise, columnwise = cast_both_ways(x, scale, dtype is E5M2)
    return rowwise, columnwise, scale.reciprocal()


@torch.library.custom_op("pentode::cast_both_ways", mutates_args=())
def cast_both_ways(x: Tensor, scale: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """x * scale in float8, E5M2 for a `gradient` and else E4M3: [M, N], and its transpose [N, M].

    One pass on a GPU: compiled operators write the transpose by single bytes, 13 times slower (docs/performance.md).
    """
    dtype = E5M2 if gradient else E4M3
    if devices.is_gpu(x.device):
        from pentode.ops.float8_kernel import cast_both_ways as by_kernel

        return by_kernel(x.contiguous(), scale, dtype)
    rowwise = _cast(x, scale, dtype).contiguous()
    return rowwise, rowwise.t().clone(memory_format=torch.contiguous_format)


@cast_both_ways.register_fake
def _(x: Tensor, scale: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    dtype, (rows, columns) = E5M2 if gradient else E4M3, x.shape
    return x.new_empty(rows, columns, dtype=dtype), x.new_empty(columns, rows, dtype=dtype)


def _scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.finfo(dtype).max / largest.float().clamp(min=TINY)


def _cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    most = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-most, most).to(dtype)
