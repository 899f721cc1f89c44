"""Triton kernels: SwiGLU and its backward. Imported only where they run."""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 2048  # of a row, that one program computes


@triton.jit
def _swiglu(gate_up: tl.tensor, found: tl.tensor, F: tl.tensor, COLUMNS: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < F
    gate = tl.load(gate_up + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(found + row * F + column, (gate * tl.sigmoid(gate) * up).to(found.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    grad: tl.tensor,
    gate_up: tl.tensor,
    found: tl.tensor,
    largest: tl.tensor,
    F: tl.tensor,
    COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < F
    here = row * 2 * F + column
    gate = tl.load(gate_up + here, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + here + F, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(grad + row * F + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    narrow = found.dtype.element_ty
    grad_gate = (dy * up * (sigmoid + silu * (1 - sigmoid))).to(narrow)
    grad_up = (dy * silu).to(narrow)
    tl.store(found + here, grad_gate, mask=inside)
    tl.store(found + here + F, grad_up, mask=inside)
    if LARGEST:
        a, b = tl.abs(grad_gate.to(tl.float32)), tl.abs(grad_up.to(tl.float32))
        wrong = tl.max(((a != a) | (b != b)).to(tl.int32))  # tl.max ignores NaN
        most = tl.where(wrong > 0, float("nan"), tl.max(tl.maximum(a, b)))
        tl.store(largest + row * tl.num_programs(1) + tl.program_id(1), most)


def swiglu(gate_up: Tensor) -> Tensor:
    """As `ops.activation.swiglu`, for a contiguous operand on a GPU; computed in float32 and rounded once."""
    tokens, features = gate_up.shape
    found = gate_up.new_empty(tokens, features // 2)
    _swiglu[_grid(found)](gate_up, found, found.shape[1], COLUMNS, num_warps=8)
    return found


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """As `ops.activation.swiglu_backward`, for contiguous operands on a GPU; computed in float32."""
    found = torch.empty_like(gate_up)
    _swiglu_backward[_grid(grad)](grad, gate_up, found, found, grad.shape[1], COLUMNS, LARGEST=False, num_warps=8)
    return found


def swiglu_backward_measured(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """As `ops.activation.swiglu_backward_measured`, likewise: each program measures what it has computed."""
    found, largest = torch.empty_like(gate_up), grad.new_empty(_grid(grad), dtype=torch.float32)
    _swiglu_backward[_grid(grad)](grad, gate_up, found, largest, grad.shape[1], COLUMNS, LARGEST=True, num_warps=8)
    return found, largest.amax()


def _grid(grad: Tensor) -> tuple[int, int]:
    tokens, F = grad.shape
    return tokens, triton.cdiv(F, COLUMNS)
