"""A Triton kernel: AdamW's update, which reads and writes everything once. Imported only where it runs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4  # elements of a program: 8 a thread, which are 16 bytes in bfloat16


@triton.jit
def _update(
    weight: tl.tensor,
    gradient: tl.tensor,
    mean: tl.tensor,
    square: tl.tensor,
    model: tl.tensor,
    constants: tl.tensor,
    of_step: tl.tensor,
    finite: tl.tensor,
    N: tl.tensor,
    MODEL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    one_minus_beta1, beta2 = tl.load(constants).to(tl.float32), tl.load(constants + 1).to(tl.float32)
    one_minus_beta2, eps = tl.load(constants + 2).to(tl.float32), tl.load(constants + 3).to(tl.float32)
    scale, keep = tl.load(of_step).to(tl.float32), tl.load(of_step + 1).to(tl.float32)
    rate, root = tl.load(of_step + 2).to(tl.float32), tl.load(of_step + 3).to(tl.float32)
    w, m = tl.load(weight + at, mask=inside), tl.load(mean + at, mask=inside)
    s = tl.load(square + at, mask=inside, other=0.0)
    if tl.load(finite) != 0:
        g = tl.load(gradient + at, mask=inside).to(tl.float32) * scale
        m += (g - m) * one_minus_beta1
        s = s * beta2 + g * g * one_minus_beta2
        w = w * keep - rate * m / (tl.sqrt(s) / root + eps)
        tl.store(weight + at, w, mask=inside)
        tl.store(mean + at, m, mask=inside)
        tl.store(square + at, s, mask=inside)
    if MODEL:
        tl.store(model + at, w.to(model.dtype.element_ty), mask=inside)


def update_(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    model: Tensor | None,
    constants: Tensor,
    of_step: Tensor,
    finite: Tensor,
) -> None:
    """As `optim.adamw.update_`, for contiguous float32 weights and means on a GPU."""
    assert weight.dtype == mean.dtype == square.dtype == torch.float32, f"AdamW's kernel has masters in {weight.dtype}"
    N = weight.numel()
    where = weight if model is None else model
    _update[(triton.cdiv(N, BLOCK),)](
        weight,
        gradient,
        mean,
        square,
        where,
        constants,
        of_step,
        finite,
        N,
        MODEL=model is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
