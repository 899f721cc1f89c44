"""Stochastic gradient descent as Nanotron has it: no momentum, weight decay added to the gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pentode.optim.master import FlatGroup


class SGD:
    """weight -= learning_rate * (gradient * scale + weight_decay * weight), equal to torch.optim.SGD.

    updates  updates made so far, 0-d float32 on the device; a step that is not finite makes none
    """

    def __init__(self, flat: Sequence[FlatGroup]) -> None:
        self.updates = torch.zeros((), device=flat[0].weight.device)
        self._flat = list(flat)

    @torch.no_grad()
    def step(self, *, learning_rate: float, scale: Tensor, finite: Tensor) -> None:
        """One update with gradient * scale (0-d); where `finite` (0-d bool) is False, nothing changes."""
        self.updates += finite
        for flat in self._flat:
            buckets = zip(flat.layout.cut(flat.weight), flat.layout.cut(flat.gradient), strict=True)
            for weight, gradient in buckets:  # so that temporaries are of one bucket
                direction = (gradient.to(weight.dtype) * scale).add_(weight, alpha=flat.weight_decay)
                torch.where(finite, weight - learning_rate * direction, weight, out=weight)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Nothing is kept per parameter."""
        return {}
