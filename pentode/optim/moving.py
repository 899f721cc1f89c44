"""Moves gradients from where backward made them into their places: the first are written, later ones added."""

import torch
from torch import Tensor

from pentode import device as devices

LARGE = 1 << 20  # elements from which adding takes a GPU longer than the launch of our own kernel takes the host


def move(places: list[Tensor], gradients: list[Tensor], *, add: bool) -> None:
    """Write gradients into their places, or add them to what is there."""
    if not add:
        torch._foreach_copy_(places, gradients)
    elif any(_is_for_kernel(place, gradient) for place, gradient in zip(places, gradients, strict=True)):
        _add(places, gradients)
    else:
        torch._foreach_add_(places, gradients)


def _is_for_kernel(place: Tensor, gradient: Tensor) -> bool:
    mixed = gradient.dtype != place.dtype and gradient.is_contiguous()
    return mixed and gradient.numel() >= LARGE and devices.is_gpu(place.device)


def _add(places: list[Tensor], gradients: list[Tensor]) -> None:
    """Add them one by one, as torch adds tensors of two dtypes too."""
    from pentode.optim.add_kernel import add_

    for place, gradient in zip(places, gradients, strict=True):
        if _is_for_kernel(place, gradient):
            add_(place, gradient)
        else:
            place.add_(gradient)
