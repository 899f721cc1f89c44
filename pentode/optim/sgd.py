"""Stochastic gradient descent as Nanotron has it: no momentum, weight decay added to the gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pentode.optim.flat import Shard, Stepped, nobody


class SGD:
    """weight -= learning_rate * (gradient * scale + weight_decay * weight), equal to torch.optim.SGD.

    updates  updates made so far, 0-d float32 on the device; a step that is not finite makes none
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.updates = torch.zeros((), device=shards[0].weight.device)
        self._shards = list(shards)

    @torch.no_grad()
    def step(self, *, learning_rate: float | Tensor, scale: Tensor, finite: Tensor, stepped: Stepped = nobody) -> None:
        """One update with gradient * scale (0-d); where `finite` (0-d bool) is False, nothing changes.

        `stepped` is called with each shard when its update is under way.
        """
        self.updates += finite
        for shard in self._shards:  # one by one, so that temporaries are of one bucket
            direction = (shard.gradient.to(shard.weight.dtype) * scale).add_(shard.weight, alpha=shard.weight_decay)
            torch.where(finite, shard.weight - learning_rate * direction, shard.weight, out=shard.weight)
            shard.round_()
            stepped(shard)

    def state(self) -> dict[str, list[Tensor]]:
        """Nothing is kept per parameter."""
        return {}
