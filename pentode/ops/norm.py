"""Norms over the last dimension, computed in at least float32 whatever the dtype of x, and rounded once, at the end."""

# An autograd Function gives its context attributes and its backward a signature that torch's stubs do not know.
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pentode import device as devices


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467)."""
    return F.rms_norm(x, weight.shape, weight, eps)  # widens bfloat16 itself, bit for bit as a cast would


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias (arXiv:1607.06450)."""
    if x.dtype.itemsize >= 4:  # no idle cast: last in a compiled Function, it loses torch 2.11 the gradient
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    # F.layer_norm in bfloat16 is not its float32 result rounded.
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)


def beside_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x, to which something may be `added`, and its norm: `layer_norm` if there is a bias, else `rms_norm`.

    For a stream that goes on beside its norm. On a GPU one kernel adds and takes the norm, and one, also in compiled
    blocks, makes the norm's gradient and adds the stream's (docs/performance.md).
    """
    if devices.runs_kernels(x):
        return _KernelBesideNorm.apply(x, added, weight, bias, eps)
    x = x if added is None else x + added
    if torch.compiler.is_compiling():
        return _BesideNorm.apply(x, weight, bias, eps)
    return x, _norm(x, weight, bias, eps)


class _BesideNorm(torch.autograd.Function):
    """To be compiled: a copy of x, which compiled code does not make, and its norm. Keeps x."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.centred = eps, bias is not None
        return x.clone(), _norm(x, weight, bias, eps)

    @staticmethod
    def backward(ctx: FunctionCtx, stream: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x, sums = norm_backward(stream, grad, x, weight, ctx.eps, ctx.centred)
        return grad_x, sums[0], sums[1] if ctx.centred else None, None


class _KernelBesideNorm(torch.autograd.Function):
    """On a GPU: x + added, or x itself, and its norm. Keeps that sum."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        from pentode.ops.norm_kernel import norm

        stream, normed = norm(x.contiguous(), None if added is None else added.contiguous(), weight, bias, eps)
        ctx.save_for_backward(stream, weight)
        ctx.eps, ctx.centred, ctx.adds = eps, bias is not None, added is not None
        return stream, normed

    @staticmethod
    def backward(ctx: FunctionCtx, stream: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # Not `norm_backward`: a call of an operator imports torch's compiler.
        grad_x, sums = _norm_backward(stream, grad, x, weight, ctx.eps, ctx.centred)
        return grad_x, grad_x if ctx.adds else None, sums[0], sums[1] if ctx.centred else None, None


@torch.library.custom_op("pentode::norm_backward", mutates_args=())
def norm_backward(
    stream: Tensor, grad: Tensor, x: Tensor, weight: Tensor, eps: float, centred: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of weight and bias, from those of x itself, `stream`, and of its norm.

    stream, grad, x  [T, D]; weight [D]
    found            [T, D]; and [2, D] if `centred`, for `layer_norm`; else [1, D], for `rms_norm`, without a bias
    """
    return _norm_backward(stream, grad, x, weight, eps, centred)


@norm_backward.register_fake
def _(stream: Tensor, grad: Tensor, x: Tensor, weight: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    found = torch.empty_like(x, memory_format=torch.contiguous_format)
    return found, weight.new_empty(2 if centred else 1, x.shape[1])


def _norm_backward(
    stream: Tensor, grad: Tensor, x: Tensor, weight: Tensor, eps: float, centred: bool
) -> tuple[Tensor, Tensor]:
    if devices.is_gpu(x.device) and x.dtype != torch.float64:
        from pentode.ops.norm_kernel import norm_backward as by_kernel

        return by_kernel(stream.contiguous(), grad.contiguous(), x.contiguous(), weight, eps, centred)
    wide = torch.promote_types(x.dtype, torch.float32)
    a, g = x.to(wide), grad.to(wide)
    a = a - a.mean(1, keepdim=True) if centred else a
    scale = (a.square().mean(1, keepdim=True) + eps).rsqrt()
    normed, scaled = a * scale, g * weight
    inner = scaled - normed * (scaled * normed).mean(1, keepdim=True)
    inner = inner - scaled.mean(1, keepdim=True) if centred else inner
    grad_x = (stream + inner * scale).to(x.dtype).contiguous()
    sums = [(g * normed).sum(0), g.sum(0)] if centred else [(g * normed).sum(0)]
    return grad_x, torch.stack(sums).to(weight.dtype)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return rms_norm(x, weight, eps) if bias is None else layer_norm(x, weight, bias, eps)
