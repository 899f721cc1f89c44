"""y = x W^T and the two products of its backward: in the dtype of x, or in float8, scaled anew each time.

T tokens, K input and N output features. In float8 each operand is scaled as a whole (tensorwise), or by rows of what is
summed over (rowwise, arXiv:2407.21783, section 6.2). Products come out in bfloat16; weights, masters and what is kept
elsewhere stay as they are.
"""

# An autograd Function gives its context attributes and its backward a signature that torch's stubs do not know.
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pentode import device as devices
from pentode.ops import fused_products
from pentode.ops.activation import gated, swiglu, swiglu_backward_measured
from pentode.ops.float8 import E4M3, E5M2, scaled, scaled_both_ways
from pentode.ops.gradient_sum import GradientSum

Float8 = Literal["tensorwise", "rowwise"]
MULTIPLE = 16  # of which T, K and N must be, as the hardware multiplies; `config/check_speed.py` refuses others


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, float8: Float8 | None = None) -> Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N].  # [T, N]"""
    if float8 is None:
        found = fused_products.sum_for(x, weight) if bias is None else None
        return F.linear(x, weight, bias) if found is None else _SummingLinear.apply(x, weight, found)
    product = _Tensorwise if float8 == "tensorwise" else _Rowwise
    y: Tensor = product.apply(x, weight)
    return y if bias is None else y + bias


def gated_linear(x: Tensor, weight: Tensor, activation: str, *, float8: Float8) -> Tensor:
    """activation(gate) * up, of [gate, up] = x W^T; x [T, K], weight [2F, K].  # [T, F]"""
    if float8 == "tensorwise" and activation == "silu" and devices.is_gpu(x.device):
        return _TensorwiseSwiGLU.apply(x, weight)
    return gated(linear(x, weight, float8=float8), activation)


class _SummingLinear(torch.autograd.Function):
    """x W^T, whose backward adds the weight's gradient to its sum as it is made."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, found: GradientSum) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.found = found
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        return grad @ weight, fused_products.weight_gradient(grad, x.contiguous(), ctx.found), None


class _Tensorwise(torch.autograd.Function):
    """One scale for each operand. Keeps x and weight in float8, transposed, for backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        y, *kept = _tensorwise(x, weight)
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _tensorwise_backward(grad, *ctx.saved_tensors)


class _TensorwiseSwiGLU(torch.autograd.Function):
    """The same, and SwiGLU of the product, whose backward also finds the largest gradient: no pass looks for it."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        gate_up, *kept = _tensorwise(x, weight)
        ctx.save_for_backward(gate_up, *kept)
        return swiglu(gate_up)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, *kept = ctx.saved_tensors
        grad_gate_up, largest = swiglu_backward_measured(grad, gate_up)
        return _tensorwise_backward(grad_gate_up, *kept, largest=largest)


def _tensorwise(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x W^T; and for its backward x and weight in float8, transposed, each with its scale."""
    x8, x8_t, x_scale = scaled_both_ways(x, E4M3)
    w8, w8_t, w_scale = scaled_both_ways(weight, E4M3)
    return _scaled_mm(x8, x_scale, w8.t(), w_scale, fast=True), x8_t, x_scale, w8_t, w_scale


def _tensorwise_backward(
    grad: Tensor, x8_t: Tensor, x_scale: Tensor, w8_t: Tensor, w_scale: Tensor, *, largest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight; `largest` is the largest magnitude in `grad`, where that is known."""
    g8, g8_t, g_scale = scaled_both_ways(grad, E5M2, largest=largest)
    grad_x = _scaled_mm(g8, g_scale, w8_t.t(), w_scale, fast=False)
    return grad_x, _scaled_mm(g8_t, g_scale, x8_t.t(), x_scale, fast=False)


class _Rowwise(torch.autograd.Function):
    """A scale for each row of the left operand and each column of the right one. Keeps x and weight as they are."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        x8, x_scale = scaled(x, E4M3, dim=1)
        w8, w_scale = scaled(weight, E4M3, dim=1)
        return _scaled_mm(x8, x_scale, w8.t(), w_scale.t(), fast=True)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        g8, g_scale = scaled(grad, E4M3, dim=1)
        w8, w_scale = scaled(weight, E4M3, dim=0)
        grad_x = _scaled_mm(g8, g_scale, _by_columns(w8), w_scale, fast=False)
        g8, g_scale = scaled(grad, E4M3, dim=0)
        x8, x_scale = scaled(x, E4M3, dim=0)
        return grad_x, _scaled_mm(g8.t().contiguous(), g_scale.flatten()[:, None], _by_columns(x8), x_scale, fast=False)


def _scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, fast: bool) -> Tensor:
    """a b in bfloat16. `fast`: sums are kept in the tensor cores, which rounds them more: good enough for forward."""
    return torch._scaled_mm(
        a,
        b,
        scale_a=a_scale.contiguous(),
        scale_b=b_scale.contiguous(),
        out_dtype=torch.bfloat16,
        use_fast_accum=fast and a.is_cuda,
    )


def _by_columns(x: Tensor) -> Tensor:
    """The same matrix, its columns contiguous, as the right operand must be."""
    return x.t().contiguous().t()
