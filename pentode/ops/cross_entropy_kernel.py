"""Triton kernels: the passes of a cross-entropy, as few readings as may be. Imported only where they run."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pentode import device as devices
from pentode.ops import fused_products
from pentode.ops.cross_entropy import MOST_PRODUCTS, Passes

COLUMNS = 1024  # of a row, of which a program takes four pieces at a time
BLOCK, WARPS = 2048, 8  # elements of a program that works on them one by one: 8 a thread
WIDE, WIDE_WARPS = 4096, 16  # columns, of which a program that goes over a row twice takes two pieces at a time
PROGRAMS = 2  # of those on a multiprocessor: few, so that the cache still has some of a row when it is read again
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


@triton.jit
def _gradient(
    logits: tl.tensor,
    log_total: tl.tensor,
    factor: tl.tensor,
    hot: tl.tensor,
    row: tl.tensor,
    V: tl.tensor,
    held: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = logits + token * V + column
    real = tl.load(here, mask=column < held, other=0.0).to(tl.float32)
    grad = tl.exp(real - tl.load(log_total + token)) * tl.load(factor + token)
    grad -= tl.where(column == tl.load(row + token), tl.load(hot + token), 0.0)
    tl.store(here, tl.where(column < held, grad, 0.0).to(logits.dtype.element_ty), mask=column < V)


@triton.jit
def _whole(
    logits: tl.tensor,
    log_total: tl.tensor,
    labels: tl.tensor,
    ignore: tl.tensor,
    z_loss: tl.tensor,
    V: tl.tensor,
    held: tl.tensor,
    n: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    start = logits + tl.program_id(0).to(tl.int64) * V
    for token in range(tl.program_id(0), n, tl.num_programs(0)):
        most = tl.full([COLUMNS], LOWEST, tl.float32)
        sums = tl.zeros([COLUMNS], tl.float32)
        for first in range(0, held, 2 * COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            a = tl.load(start + column, mask=column < held, other=LOWEST, eviction_policy="evict_last").to(tl.float32)
            column += COLUMNS
            b = tl.load(start + column, mask=column < held, other=LOWEST, eviction_policy="evict_last").to(tl.float32)
            higher = tl.maximum(most, tl.maximum(a, b))
            sums = sums * tl.exp(most - higher) + tl.exp(a - higher) + tl.exp(b - higher)
            most = higher
        highest = tl.max(most)
        log = highest + tl.log(tl.sum(sums * tl.exp(most - highest)))
        tl.store(log_total + token, log)
        label = tl.load(labels + token)
        counts = tl.where(label == ignore, 0.0, 1.0)
        factor = counts * (1 + 2 * z_loss * log)
        pieces = tl.cdiv(V, 2 * COLUMNS)
        for piece in range(0, pieces):  # from the end, which was read last
            column = (pieces - 1 - piece) * 2 * COLUMNS + tl.arange(0, 2 * COLUMNS)
            real = tl.load(start + column, mask=column < held, other=0.0, eviction_policy="evict_first").to(tl.float32)
            grad = tl.exp(real - log) * factor - tl.where(column == label, counts, 0.0)
            grad = tl.where(column < held, grad, 0.0).to(logits.dtype.element_ty)
            tl.store(start + column, grad, mask=column < V, eviction_policy="evict_first")
        start += tl.num_programs(0).to(tl.int64) * V


@triton.jit
def _total(
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    d: tl.tensor,
    e: tl.tensor,
    scale: tl.tensor,
    total: tl.tensor,
    N: tl.tensor,
    COUNT: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    found = tl.load(a + at, mask=inside).to(tl.float32)
    if COUNT > 1:
        found += tl.load(b + at, mask=inside).to(tl.float32)
    if COUNT > 2:
        found += tl.load(c + at, mask=inside).to(tl.float32)
    if COUNT > 3:
        found += tl.load(d + at, mask=inside).to(tl.float32)
    if COUNT > 4:
        found += tl.load(e + at, mask=inside).to(tl.float32)
    found *= tl.load(scale)
    if ADD:
        found += tl.load(total + at, mask=inside).to(tl.float32)
    tl.store(total + at, found.to(total.dtype.element_ty), mask=inside)


def statistics(logits: Tensor, held: int) -> tuple[Tensor, Tensor]:
    """As `ops.cross_entropy.Passes.statistics`, for contiguous logits on a GPU, no wider than float32."""
    rows, V = logits.shape
    top, total = logits.new_empty(2, rows, dtype=torch.float32)
    _statistics[(rows,)](logits, top, total, V, held, COLUMNS, num_warps=4)
    return top, total


def gradient_(logits: Tensor, held: int, log_total: Tensor, factor: Tensor, hot: Tensor, row: Tensor) -> None:
    """As `Passes.gradient_`, likewise."""
    rows, V = logits.shape
    _gradient[(rows, triton.cdiv(V, BLOCK))](logits, log_total, factor, hot, row, V, held, BLOCK, num_warps=WARPS)


def whole_(logits: Tensor, held: int, labels: Tensor, ignore: int, z_loss: float) -> Tensor:
    """As `Passes.whole_`, likewise."""
    n, V = logits.shape
    if held == V and not z_loss and fused_products.serves_loss(logits):
        return fused_products.cross_entropy_(logits, labels, ignore)
    log_total = logits.new_empty(n, dtype=torch.float32)
    programs = min(n, PROGRAMS * devices.multiprocessors(logits.device))
    _whole[(programs,)](logits, log_total, labels, ignore, z_loss, V, held, n, WIDE, num_warps=WIDE_WARPS)
    return log_total


def total_(products: list[Tensor], scale: Tensor, into: Tensor, add: bool) -> None:
    """As `Passes.total_`, for up to MOST_PRODUCTS products, contiguous as `into` is, likewise."""
    assert len(products) <= MOST_PRODUCTS, f"{len(products)} products to add at once"
    operands = [*products, *[products[0]] * (MOST_PRODUCTS - len(products))]
    grid = (triton.cdiv(into.numel(), BLOCK),)
    _total[grid](*operands, scale, into, into.numel(), len(products), add, BLOCK, num_warps=WARPS)


PASSES = Passes(statistics, gradient_, total_, whole_)
