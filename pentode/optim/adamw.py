"""AdamW (arXiv:1711.05101) over flat buffers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pentode import log
from pentode.optim import fused
from pentode.optim.master import FlatGroup


@dataclass(frozen=True)
class _Slices:
    """A flat group bucket by bucket, and the running means of the gradient and of its square."""

    flat: FlatGroup
    weights: list[Tensor]
    gradients: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]

    def buckets(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(weight, gradient, mean, square) of each bucket."""
        return zip(self.weights, self.gradients, self.means, self.squares, strict=True)


class AdamW:
    """Adam with decoupled weight decay, equal to torch.optim.AdamW.

    updates  updates made so far, 0-d float32 on the device; a step that is not finite makes none
    """

    def __init__(self, flat: Sequence[FlatGroup], *, betas: tuple[float, float], eps: float, use_fused: bool) -> None:
        self.betas, self.eps = betas, eps
        self.fused = use_fused and all(fused.usable(group.weight) for group in flat)
        if use_fused and not self.fused:
            log.once("optimizer: this torch has no fused AdamW for this device and dtype; the plain form is used")
        self.updates = torch.zeros((), device=flat[0].weight.device)
        self._moments = [(group, torch.zeros_like(group.weight), torch.zeros_like(group.weight)) for group in flat]
        self._slices = [
            _Slices(group, *(group.layout.cut(buffer) for buffer in (group.weight, group.gradient, mean, square)))
            for group, mean, square in self._moments
        ]

    @torch.no_grad()
    def step(self, *, learning_rate: float, scale: Tensor, finite: Tensor) -> None:
        """One update with gradient * scale (0-d); where `finite` (0-d bool) is False, nothing changes.

        The gradients are not to be read afterwards.
        """
        self.updates += finite
        step = self._step_fused if self.fused else self._step_plain
        for part in self._slices:
            step(part, learning_rate, scale=scale, finite=finite)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Views of the moments by parameter name: writing into them, and into `updates`, restores an optimizer."""
        found = {}
        for group, mean, square in self._moments:
            means, squares = group.layout.views(mean), group.layout.views(square)
            found |= {name: {"exp_avg": means[name], "exp_avg_sq": squares[name]} for name in means}
        return found

    def _step_fused(self, part: _Slices, learning_rate: float, *, scale: Tensor, finite: Tensor) -> None:
        update = partial(
            fused.adamw_,
            updates=self.updates,
            learning_rate=learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=part.flat.weight_decay,
            skip=(~finite).float(),
        )
        if part.flat.gradient.dtype == part.flat.weight.dtype == torch.float32:  # the kernel's own scale is float32
            update(part.weights, part.gradients, (part.means, part.squares), divide_by=1 / scale.float())
            return
        for weight, gradient, mean, square in part.buckets():  # one bucket's gradient at a time exists twice
            update([weight], [gradient.to(weight.dtype) * scale], ([mean], [square]), divide_by=None)

    def _step_plain(self, part: _Slices, learning_rate: float, *, scale: Tensor, finite: Tensor) -> None:
        beta1, beta2 = self.betas
        count = self.updates.double()
        correction1, correction2 = 1 - beta1**count, 1 - beta2**count
        for weight, gradient, mean, square in part.buckets():
            g = gradient.to(weight.dtype) * scale
            m = mean.lerp(g, 1 - beta1)
            s = (square * beta2).addcmul_(g, g, value=1 - beta2)
            denominator = (s.sqrt() / correction2.sqrt()).add_(self.eps)
            w = weight * (1 - learning_rate * part.flat.weight_decay)
            w -= (learning_rate / correction1) * m / denominator
            for kept, found in ((weight, w), (mean, m), (square, s)):
                torch.where(finite, found, kept, out=kept)
