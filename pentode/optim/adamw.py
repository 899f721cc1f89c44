"""AdamW (arXiv:1711.05101) over flat buffers."""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from pentode import log
from pentode.optim import fused
from pentode.optim.flat import Shard


class _Part(NamedTuple):
    """A shard, and the running means of its gradient and of that one's square."""

    shard: Shard
    mean: Tensor
    square: Tensor


class AdamW:
    """Adam with decoupled weight decay, equal to torch.optim.AdamW.

    updates  updates made so far, 0-d float32 on the device; a step that is not finite makes none
    """

    def __init__(self, shards: Sequence[Shard], *, betas: tuple[float, float], eps: float, use_fused: bool) -> None:
        self.betas, self.eps = betas, eps
        kinds = {shard.weight.dtype: shard.weight for shard in shards}
        self.fused = use_fused and all(fused.usable(weight) for weight in kinds.values())
        if use_fused and not self.fused:
            log.once("optimizer: this torch has no fused AdamW for this device and dtype; the plain form is used")
        self.updates = torch.zeros((), device=shards[0].weight.device)
        self._parts = [_Part(shard, torch.zeros_like(shard.weight), torch.zeros_like(shard.weight)) for shard in shards]

    @torch.no_grad()
    def step(self, *, learning_rate: float, scale: Tensor, finite: Tensor) -> None:
        """One update with gradient * scale (0-d); where `finite` (0-d bool) is False, nothing changes.

        The gradients are not to be read afterwards.
        """
        self.updates += finite
        step = self._step_fused if self.fused else self._step_plain
        for _, parts in groupby(self._parts, key=lambda part: (part.shard.weight_decay, part.shard.weight.dtype)):
            step(list(parts), learning_rate, scale=scale, finite=finite)

    def state(self) -> dict[str, list[Tensor]]:
        """The moments, one beside each shard: writing into them, and into `updates`, restores an optimizer."""
        return {"exp_avg": [part.mean for part in self._parts], "exp_avg_sq": [part.square for part in self._parts]}

    def _step_fused(self, parts: list[_Part], learning_rate: float, *, scale: Tensor, finite: Tensor) -> None:
        update = partial(
            fused.adamw_,
            updates=self.updates,
            learning_rate=learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=parts[0].shard.weight_decay,
            skip=(~finite).float(),
        )
        shards, means, squares = (list(column) for column in zip(*parts, strict=True))
        if all(
            s.gradient.dtype == s.weight.dtype == torch.float32 for s in shards
        ):  # the kernel's own scale is float32
            moments = (means, squares)
            weights, gradients = [s.weight for s in shards], [s.gradient for s in shards]
            update(weights, gradients, moments, divide_by=1 / scale.float())
            return
        for shard, mean, square in parts:  # one bucket's gradient at a time exists twice
            gradient = shard.gradient.to(shard.weight.dtype) * scale
            update([shard.weight], [gradient], ([mean], [square]), divide_by=None)

    def _step_plain(self, parts: list[_Part], learning_rate: float, *, scale: Tensor, finite: Tensor) -> None:
        beta1, beta2 = self.betas
        count = self.updates.double()
        correction1, correction2 = 1 - beta1**count, 1 - beta2**count
        for shard, mean, square in parts:
            g = shard.gradient.to(shard.weight.dtype) * scale
            m = mean.lerp(g, 1 - beta1)
            s = (square * beta2).addcmul_(g, g, value=1 - beta2)
            denominator = (s.sqrt() / correction2.sqrt()).add_(self.eps)
            w = shard.weight * (1 - learning_rate * shard.weight_decay)
            w -= (learning_rate / correction1) * m / denominator
            for kept, found in ((shard.weight, w), (mean, m), (square, s)):
                torch.where(finite, found, kept, out=kept)
