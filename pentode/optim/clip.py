"""The gradient's norm, and the factor that brings it down to a bound. Everything stays on the device."""

import torch
from torch import Tensor

from pentode import device as devices
from pentode.optim.layout import ALIGN
from pentode.optim.master import MasterWeights

EPSILON = 1e-6  # torch's clip_grad_norm_ and Nanotron add it to the norm


def squared_norm(master: MasterWeights) -> Tensor:
    """This rank's part of the squared Euclidean norm of the whole model's gradient, 0-d, in float32 or wider.

    Summed over `mesh.world`, each element of the global gradient counts once: what several ranks hold counts on its
    owner. Not finite if any element is not.
    """
    counts = master.sharded or master.data.rank == 0
    squares = [_sum_of_squares(gradient) for gradient in master.own_gradients() if counts]
    like = master.flat[0].gradient
    return torch.stack(squares).sum() if squares else like.new_zeros((), dtype=_wide(like.dtype))


def clip_scale(norm: Tensor, max_norm: float | None) -> Tensor:
    """What to multiply the gradient by so that its norm is at most `max_norm`, 0-d; 1 where there is no bound."""
    if max_norm is None:
        return torch.ones_like(norm)
    return (max_norm / (norm + EPSILON)).clamp(max=1.0)


def _sum_of_squares(gradient: Tensor) -> Tensor:
    """In float32 or wider; on a CPU row by row: over one long vector torch's norm there is 4e-4 off at 10M elements."""
    dtype = _wide(gradient.dtype)
    if devices.is_gpu(gradient.device):
        return torch.linalg.vector_norm(gradient, dtype=dtype).square()
    whole = gradient.numel() // ALIGN * ALIGN
    rows = torch.linalg.vector_norm(gradient[:whole].view(-1, ALIGN), dim=1, dtype=dtype).square().sum()
    if whole == gradient.numel():
        return rows
    return rows + torch.linalg.vector_norm(gradient[whole:], dtype=dtype).square()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
