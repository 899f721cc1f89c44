"""Gated nonlinearities: the backward that a GPU's kernel computes is autograd's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pentode.ops import activation
from pentode.ops.activation import ACTIVATIONS, gated, swiglu_backward, swiglu_backward_measured

SIZES = [(3, 2048), (65 if torch.cuda.is_available() else 5, 5000), (1, 24)]  # tokens and features of kernels


def operands(tokens: int, features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradient [T, F] and [gate, up] [T, 2F]."""
    generator = torch.Generator().manual_seed(0)
    grad, gate_up = (torch.randn(tokens, n, generator=generator) for n in (features, 2 * features))
    return grad.to(dtype), (4 * gate_up).to(dtype)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_the_first_half_is_the_gate(name: str) -> None:
    gate_up = operands(5, 3, torch.float64)[1]
    torch.testing.assert_close(gated(gate_up, name), ACTIVATIONS[name](gate_up[:, :3]) * gate_up[:, 3:])


def test_the_backward_of_swiglu_is_the_derivative() -> None:
    gate_up = operands(5, 3, torch.float64)[1].requires_grad_()
    assert torch.autograd.gradcheck(activation._SwiGLU.apply, (gate_up,))
    torch.testing.assert_close(activation._SwiGLU.apply(gate_up), gated(gate_up, "silu"))


def test_the_backward_is_an_operator_that_compiles() -> None:
    for operator in (swiglu_backward, swiglu_backward_measured):
        torch.library.opcheck(operator, operands(5, 3, torch.float32), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_largest_is_measured(dtype: torch.dtype) -> None:
    grad, gate_up = operands(5, 3, dtype)
    found, largest = swiglu_backward_measured(grad, gate_up)
    assert torch.equal(found, swiglu_backward(grad, gate_up))
    assert largest.item() == found.abs().max().float().item()


def test_a_compiled_gate_has_the_gradient_of_a_plain_one() -> None:
    grad, gate_up = operands(7, 16, torch.float64)
    found = []
    for run in (lambda x: gated(x, "silu"), torch.compile(activation._SwiGLU.apply, fullgraph=True)):
        x = gate_up.clone().requires_grad_()
        run(x).backward(grad)
        found.append(x.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "features"), SIZES)
def test_the_kernel_is_the_plain_form(kernels: torch.device, tokens: int, features: int, dtype: torch.dtype) -> None:
    grad, gate_up = (x.to(kernels) for x in operands(tokens, features, dtype))
    x = gate_up.float().clone().requires_grad_()
    gate, up = x.chunk(2, dim=1)
    (F.silu(gate) * up).backward(grad.float())
    torch.testing.assert_close(swiglu_backward(grad, gate_up), x.grad.to(dtype))
    y = gate_up.clone().requires_grad_()
    gated(y, "silu").backward(grad)
    assert torch.equal(y.grad, swiglu_backward(grad, gate_up))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "features"), SIZES)
def test_the_kernel_finds_the_largest(kernels: torch.device, tokens: int, features: int, dtype: torch.dtype) -> None:
    grad, gate_up = (x.to(kernels) for x in operands(tokens, features, dtype))
    found, largest = swiglu_backward_measured(grad, gate_up)
    assert torch.equal(found, swiglu_backward(grad, gate_up))
    assert largest.item() == found.abs().max().item()
    gate_up[-1, features // 2] = torch.nan
    assert swiglu_backward_measured(grad, gate_up)[1].isnan()
