"""The nonlinearities of feed-forward layers, by the names that Hugging Face gives them, and gated by a second half."""

# An autograd Function gives its context attributes and its backward a signature that torch's stubs do not know.
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pentode import device as devices

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),  # the formula of GPT-2, spelled out there
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, of a fused layer's [gate, up] (arXiv:2002.05202).

    gate_up  [T, 2F]
    y        [T, F]
    """
    if activation == "silu" and devices.is_gpu(gate_up.device) and gate_up.dtype != torch.float64:
        return _SwiGLU.apply(gate_up)
    return _gated(gate_up, ACTIVATIONS[activation])


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, as `gated`, with autograd's own backward."""
    return _gated(gate_up, F.silu)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, one kernel each way; in compiled blocks backward alone, an operator."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        if devices.runs_kernels(gate_up):
            from pentode.ops.activation_kernel import swiglu as by_kernel

            return by_kernel(gate_up.contiguous())
        return swiglu(gate_up)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        # The operator is for compiled code: a call of it from elsewhere imports torch's compiler.
        return swiglu_backward(grad, gate_up) if torch.compiler.is_compiling() else _swiglu_backward(grad, gate_up)


@torch.library.custom_op("pentode::swiglu_backward", mutates_args=())
def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of [gate, up], [T, 2F], from that of silu(gate) * up, [T, F].

    One pass on a GPU: compiled operators read everything once for either half (docs/performance.md).
    """
    return _swiglu_backward(grad, gate_up)


@torch.library.custom_op("pentode::swiglu_backward_measured", mutates_args=())
def swiglu_backward_measured(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`swiglu_backward`, and the largest magnitude in it, 0-d float32: float8 scales by that, and need not look."""
    if devices.is_gpu(grad.device):
        from pentode.ops.activation_kernel import swiglu_backward_measured as by_kernel

        return by_kernel(grad.contiguous(), gate_up.contiguous())
    found = _swiglu_backward(grad, gate_up)
    return found, found.abs().amax().float()


@swiglu_backward.register_fake
def _(grad: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


@swiglu_backward_measured.register_fake
def _(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(gate_up, memory_format=torch.contiguous_format),
        grad.new_empty((), dtype=torch.float32),
    )


def _gated(gate_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return activation(gate) * up


def _swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    if devices.is_gpu(grad.device) and grad.dtype != torch.float64:
        from pentode.ops.activation_kernel import swiglu_backward as by_kernel

        return by_kernel(grad.contiguous(), gate_up.contiguous())
    gate, up = gate_up.chunk(2, dim=1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    return torch.cat([grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu], dim=1)
