"""A Triton kernel: the backward of SwiGLU. Imported only where a GPU runs it."""
# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 2048  # of a row, that one program computes


@triton.jit
def _swiglu_backward(
    grad: tl.tensor, gate_up: tl.tensor, found: tl.tensor, F: tl.tensor, COLUMNS: tl.constexpr
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
    tl.store(found + here, (dy * up * (sigmoid + silu * (1 - sigmoid))).to(narrow), mask=inside)
    tl.store(found + here + F, (dy * silu).to(narrow), mask=inside)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """As `ops.activation.swiglu_backward`, for contiguous operands on a GPU; computed in float32."""
    (tokens, F), found = grad.shape, torch.empty_like(gate_up)
    _swiglu_backward[(tokens, triton.cdiv(F, COLUMNS))](grad, gate_up, found, F, COLUMNS, num_warps=8)
    return found
