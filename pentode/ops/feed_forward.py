"""A feed-forward layer gated by SwiGLU (arXiv:2002.05202), whole, where its products do what follows them."""

# An autograd Function gives its context attributes and its backward a signature that torch's stubs do not know.
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pentode.ops import fused_products
from pentode.ops.fused_products import MULTIPLE
from pentode.ops.gradient_sum import sum_of


def is_fused(x: Tensor, gate_up: Tensor) -> bool:
    """Whether `swiglu_layer` is to do the layer, of x [T, K] and gate_up [2F, K], whose backward is to come."""
    return torch.is_grad_enabled() and gate_up.shape[0] % (2 * MULTIPLE) == 0 and fused_products.serves(x, gate_up)


def swiglu_layer(x: Tensor, gate_up: Tensor, down: Tensor, *, onto: Tensor, again: bool = False) -> Tensor:
    """onto + (silu(gate) * up) down^T, of [gate, up] = x gate_up^T.

    x, onto  [T, K]
    gate_up  [2F, K]; down [K, F]
    y        [T, K]

    Keeps x, gate, up and silu(gate) * up; not the last if it is to be computed `again` in backward, by the product that
    makes the gradient of gate and up.
    """
    return _SwiGLULayer.apply(x, gate_up, down, onto, again)


class _SwiGLULayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, gate_up: Tensor, down: Tensor, onto: Tensor, again: bool) -> Tensor:
        x = x.contiguous()
        in_turn, y = fused_products.swiglu(x, gate_up)
        ctx.save_for_backward(x, gate_up, down, in_turn, *(() if again else (y,)))
        ctx.sums = sum_of(gate_up), sum_of(down)  # not in backward: of what is recomputed, tensors come without it
        return fused_products.linear_onto(onto.contiguous(), y, down)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, in_turn, *kept = ctx.saved_tensors
        sum_of_gate_up, sum_of_down = ctx.sums
        grad = grad.contiguous()
        if kept:
            grad_in_turn, y = fused_products.swiglu_gradient(grad, down, in_turn), kept.pop()
        else:
            grad_in_turn, y = fused_products.swiglu_backward(grad, down, in_turn)
        grad_down = fused_products.weight_gradient(grad, y, sum_of_down)
        del y
        grad_gate_up = fused_products.weight_gradient(grad_in_turn, x, sum_of_gate_up, in_turn=True)
        return fused_products.swiglu_input_gradient(grad_in_turn, gate_up), grad_gate_up, grad_down, grad, None
