"""Triton kernels: a norm beside its stream, and its backward. Imported only where they run."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pentode import device as devices

ELEMENTS = 8  # of a row, for each thread
AT_ONCE = 8192  # elements that a multiprocessor works on: as many rows as they make, but at least one
REGISTERS = 64  # of a thread: with more, not all of these rows fit
ROWS, COLUMNS = 128, 32  # of a tile, in the sum of what the programs found


@triton.jit
def _norm(
    x: tl.tensor,
    added: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    stream: tl.tensor,
    normed: tl.tensor,
    D: tl.tensor,
    eps: tl.tensor,
    ADDED: tl.constexpr,
    CENTRED: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    column = tl.arange(0, WIDTH)
    inside = column < D
    here = tl.program_id(0).to(tl.int64) * D + column
    a = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        total = (a + tl.load(added + here, mask=inside, other=0.0).to(tl.float32)).to(stream.dtype.element_ty)
        tl.store(stream + here, total, mask=inside)
        a = total.to(tl.float32)  # what the stream holds, rounded
    if CENTRED:
        a = tl.where(inside, a - tl.sum(a) / D, 0.0)
    y = a * tl.rsqrt(tl.sum(a * a) / D + eps) * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + here, y.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(
    stream: tl.tensor,
    grad: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    found: tl.tensor,
    for_weight: tl.tensor,
    for_bias: tl.tensor,
    T: tl.tensor,
    D: tl.tensor,
    eps: tl.tensor,
    CENTRED: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    column = tl.arange(0, WIDTH)
    inside = column < D
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([WIDTH], tl.float32)
    bias_sum = tl.zeros([WIDTH], tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), T, tl.num_programs(0)):
        here = row * D + column
        a = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + here, mask=inside, other=0.0).to(tl.float32)
        beside = tl.load(stream + here, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            a = tl.where(inside, a - tl.sum(a) / D, 0.0)
        scale = tl.rsqrt(tl.sum(a * a) / D + eps)
        normed, scaled = a * scale, g * w
        inner = scaled - normed * (tl.sum(scaled * a) * scale / D)
        if CENTRED:
            inner -= tl.sum(scaled) / D
            bias_sum += g
        weight_sum += g * normed
        tl.store(found + here, (beside + inner * scale).to(found.dtype.element_ty), mask=inside)
    own = tl.program_id(0) * D + column
    tl.store(for_weight + own, weight_sum, mask=inside)
    if CENTRED:
        tl.store(for_bias + own, bias_sum, mask=inside)


@triton.jit
def _sum_columns(
    parts: tl.tensor, total: tl.tensor, P: tl.tensor, D: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * P * D
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, P, ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = (row[:, None] < P) & (column[None, :] < D)
        sums += tl.load(parts + first + row[:, None] * D + column[None, :], mask=inside, other=0.0)
    found = tl.sum(sums, axis=0).to(total.dtype.element_ty)
    tl.store(total + tl.program_id(1) * D + column, found, mask=column < D)


def norm(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x + added, or x itself if that is None, and its norm, as `ops.norm.beside_norm`; all contiguous, on a GPU."""
    T, D = x.shape
    stream, normed = x if added is None else torch.empty_like(x), torch.empty_like(x)
    width = triton.next_power_of_2(D)
    _norm[(T,)](
        x,
        x if added is None else added,
        weight,
        weight if bias is None else bias,
        stream,
        normed,
        D,
        eps,
        ADDED=added is not None,
        CENTRED=bias is not None,
        WIDTH=width,
        num_warps=_warps(width),
    )
    return stream, normed


def norm_backward(
    stream: Tensor, grad: Tensor, x: Tensor, weight: Tensor, eps: float, centred: bool
) -> tuple[Tensor, Tensor]:
    """As `ops.norm.norm_backward`, for contiguous operands on a GPU; computed in float32."""
    (T, D), kinds, found = x.shape, 2 if centred else 1, torch.empty_like(x)
    width = triton.next_power_of_2(D)
    programs = min(T, devices.multiprocessors(x.device) * max(1, AT_ONCE // width))
    parts = x.new_empty(kinds, programs, D, dtype=torch.float32)
    total = weight.new_empty(kinds, D)
    _norm_backward[(programs,)](
        stream,
        grad,
        x,
        weight,
        found,
        parts[0],
        parts[-1],
        T,
        D,
        eps,
        CENTRED=centred,
        WIDTH=width,
        num_warps=_warps(width),
        maxnreg=REGISTERS,
    )
    _sum_columns[(triton.cdiv(D, COLUMNS), kinds)](parts, total, programs, D, ROWS, COLUMNS, num_warps=8)
    return found, total


def _warps(width: int) -> int:
    return min(max(width // (32 * ELEMENTS), 1), 32)
