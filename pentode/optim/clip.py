"""The gradient's norm, and the factor that brings it down to a bound. Everything stays on the device."""

import torch
from torch import Tensor

from pentode.dist.collectives import sum_
from pentode.dist.mesh import Mesh
from pentode.optim.layout import ALIGN
from pentode.optim.master import MasterWeights

EPSILON = 1e-6  # torch's clip_grad_norm_ and Nanotron add it to the norm


def gradient_norm(master: MasterWeights, mesh: Mesh) -> Tensor:
    """The Euclidean norm of the whole model's gradient, 0-d, in float32 (float64 for float64 gradients).

    Each element of the global gradient counts once: what every tp rank holds a copy of counts on the first of them. All
    ranks of `mesh.model` must call. Not finite if any element is not.
    """
    squares = [_sum_of_squares(flat.gradient) * (flat.cut or mesh.tp.rank == 0) for flat in master.flat]
    return sum_(torch.stack(squares).sum(), mesh.model).sqrt()


def clip_scale(norm: Tensor, max_norm: float | None) -> Tensor:
    """What to multiply the gradient by so that its norm is at most `max_norm`, 0-d; 1 where there is no bound."""
    if max_norm is None:
        return torch.ones_like(norm)
    return (max_norm / (norm + EPSILON)).clamp(max=1.0)


def _sum_of_squares(gradient: Tensor) -> Tensor:
    """In float32, row by row: over one long vector torch's norm on a CPU is 4e-4 off at 10M elements."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient.view(-1, ALIGN), dim=1, dtype=dtype).square().sum()
