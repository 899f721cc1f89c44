"""Rotary positions (arXiv:2104.09864), and the ways of stretching them to longer texts that Llama uses.

T tokens, H heads, E head size. Feature i turns together with feature i + E/2, as in Hugging Face's Llama, or, where
`interleaved`, feature 2i with 2i + 1, as in the paper.
"""

# An autograd Function gives its context attributes and its backward a signature that torch's stubs do not know.
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

from math import pi

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pentode import device as devices


def frequencies(head_dim: int, *, theta: float, dtype: torch.dtype) -> Tensor:
    """Radians per position of each pair of features.  # [E/2]"""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim)


def scale_llama3(
    frequencies: Tensor, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_positions: int
) -> Tensor:
    """Llama 3.1's stretching: slow waves by `factor`, fast ones not at all, those between by something between.

    A wave is slow if it turns fewer than `low_freq_factor` times within the positions that the model was first trained
    on, fast if it turns more than `high_freq_factor` times.
    """
    turns = original_positions * frequencies / (2 * pi)
    fast = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 - fast) * frequencies / factor + fast * frequencies


def angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each token's angles, in the dtype of the frequencies.  # 2 x [T, 1, E/2]"""
    turned = positions.to(frequencies.dtype)[:, None, None] * frequencies
    return turned.cos(), turned.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """x [T, H, E] turned by its tokens' angles; computed in the dtype of cos and sin, returned in that of x."""
    wide = x.to(cos.dtype)
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, dim=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    y = torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)
    return y.to(x.dtype)


def rotate_heads(
    heads: Tensor, cos: Tensor, sin: Tensor, *, kv_heads: int, interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v from what a fused layer made of them, q and k turned by their tokens' angles; one kernel on a GPU.

    heads  [T, H + 2K, E]; cos and sin [T, 1, E/2]
    found  [T, H, E], and [T, K, E] twice
    """
    if devices.runs_kernels(heads):
        return _RotateHeads.apply(heads, cos, sin, kv_heads, interleaved)
    q, k, v = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    q, k = (rotate(t, cos, sin, interleaved=interleaved) for t in (q, k))
    return q, k, v


class _RotateHeads(torch.autograd.Function):
    """q and k of their own, and v as it lies among `heads`. Keeps the angles."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, heads: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, interleaved: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        from pentode.ops.rope_kernel import turn

        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        q, k = turn(heads.contiguous(), cos, sin, kv_heads=kv_heads, interleaved=interleaved)
        return q, k, heads[:, -kv_heads:]

    @staticmethod
    def backward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
        from pentode.ops.rope_kernel import turn_back

        cos, sin = ctx.saved_tensors
        grads = (q.contiguous(), k.contiguous(), v.contiguous())
        return turn_back(*grads, cos, sin, interleaved=ctx.interleaved), None, None, None, None
