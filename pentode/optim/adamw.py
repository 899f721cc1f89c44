"""AdamW (arXiv:1711.05101) over flat buffers."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from pentode import log
from pentode.optim import fused
from pentode.optim.flat import Shard, Stepped, nobody
from pentode.optim.layout import ALIGN

PIECE = 1 << 24  # elements that the plain form updates at a time, so that its temporaries stay small
LARGE_PIECE = 1 << 30  # elements that the one-pass form updates at a time: compiled, it numbers them by 32 bits
Update = Callable[..., None]


class _Part(NamedTuple):
    """A shard, and the running means of its gradient and of that one's square."""

    shard: Shard
    mean: Tensor
    square: Tensor


class AdamW:
    """Adam with decoupled weight decay, equal to torch.optim.AdamW.

    updates  updates made so far, 0-d float32 on the device; a step that is not finite makes none

    `use_fused`: torch's fused operator where it has one; or, where `update` is given, that: `update_` compiled, or a
    kernel, which reads and writes everything once, 30 bytes a parameter with bfloat16 weights and float32 gradients.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        betas: tuple[float, float],
        eps: float,
        use_fused: bool,
        update: Update | None = None,
    ) -> None:
        self.betas, self.eps = betas, eps
        self.update = update if use_fused else None
        kinds = {shard.weight.dtype: shard.weight for shard in shards}
        self.fused = use_fused and update is None and all(fused.usable(weight) for weight in kinds.values())
        if use_fused and update is None and not self.fused:
            log.once("optimizer: this torch has no fused AdamW for this device and dtype; the plain form is used")
        device = shards[0].weight.device
        self.updates = torch.zeros((), device=device)
        beta1, beta2 = betas
        self._constants = torch.tensor([1 - beta1, beta2, 1 - beta2, eps], dtype=torch.float64, device=device)
        self._parts = [_Part(shard, torch.zeros_like(shard.weight), torch.zeros_like(shard.weight)) for shard in shards]

    @torch.no_grad()
    def step(self, *, learning_rate: float | Tensor, scale: Tensor, finite: Tensor, stepped: Stepped = nobody) -> None:
        """One update with gradient * scale (0-d); where `finite` (0-d bool) is False, nothing changes.

        The gradients are not to be read afterwards. `stepped` is called with each shard when its update is under way.
        """
        self.updates += finite
        step = self._step_fused if self.fused else self._step_plain
        for _, parts in groupby(self._parts, key=lambda part: (part.shard.weight_decay, part.shard.weight.dtype)):
            step(list(parts), learning_rate, scale=scale, finite=finite, stepped=stepped)

    def state(self) -> dict[str, list[Tensor]]:
        """The moments, one beside each shard: writing into them, and into `updates`, restores an optimizer."""
        return {"exp_avg": [part.mean for part in self._parts], "exp_avg_sq": [part.square for part in self._parts]}

    def _step_fused(
        self, parts: list[_Part], learning_rate: float | Tensor, *, scale: Tensor, finite: Tensor, stepped: Stepped
    ) -> None:
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
        else:
            for shard, mean, square in parts:  # one bucket's gradient at a time exists twice
                gradient = shard.gradient.to(shard.weight.dtype) * scale
                update([shard.weight], [gradient], ([mean], [square]), divide_by=None)
        for shard in shards:
            shard.round_()
            stepped(shard)

    def _step_plain(
        self, parts: list[_Part], learning_rate: float | Tensor, *, scale: Tensor, finite: Tensor, stepped: Stepped
    ) -> None:
        numbers = self._numbers(learning_rate, parts[0].shard.weight_decay, scale=scale, finite=finite)
        for shard, mean, square in parts:
            model = None if shard.model is shard.weight else shard.model
            tensors = (shard.weight, shard.gradient, mean, square, model)
            if self.update is not None:
                for piece in _pieces(tensors, LARGE_PIECE):
                    self.update(*(t if t is None else t.view(-1, ALIGN) for t in piece), *numbers)
            else:
                for piece in _pieces(tensors, PIECE):
                    update_(*piece, *numbers)
            stepped(shard)

    def _numbers(
        self, learning_rate: float | Tensor, weight_decay: float, *, scale: Tensor, finite: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `update_` takes after its tensors; `finite` comes last, by itself."""
        beta1, beta2 = self.betas
        count = self.updates.double()
        rate = count.new_ones(()) * learning_rate  # a tensor made of a number would wait for the device
        of_step = torch.stack(
            [
                scale.double(),
                1 - rate * weight_decay,
                rate / (1 - beta1**count),
                (1 - beta2**count).sqrt(),
            ]
        )
        return self._constants, of_step, finite


def update_(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    model: Tensor | None,
    constants: Tensor,
    of_step: Tensor,
    finite: Tensor,
) -> None:
    """AdamW's update of tensors of one shape, in place; `model` takes the new weights in its own dtype.

    constants  [4] float64: 1 - beta1, beta2, 1 - beta2, eps
    of_step    [4] float64: gradient's scale, 1 - learning rate * weight decay, learning rate / (1 - beta1^t),
               sqrt(1 - beta2^t)
    """
    one_minus_beta1, beta2, one_minus_beta2, eps = constants.unbind()
    scale, keep, rate, root = of_step.unbind()
    g = gradient.to(weight.dtype) * scale
    m = mean + (g - mean) * one_minus_beta1
    s = square * beta2 + g * g * one_minus_beta2
    w = weight * keep - rate * m / (s.sqrt() / root + eps)
    w, m, s = (torch.where(finite, new, old) for new, old in ((w, weight), (m, mean), (s, square)))
    weight.copy_(w)
    mean.copy_(m)
    square.copy_(s)
    if model is not None:
        model.copy_(w)


def _pieces(tensors: Sequence[Tensor | None], length: int) -> Iterator[tuple[Tensor | None, ...]]:
    """Tensors of one length, cut alike into pieces of at most this `length`."""
    parts = [None if tensor is None else tensor.split(length) for tensor in tensors]
    count = max(len(part) for part in parts if part is not None)
    for i in range(count):
        yield tuple(None if part is None else part[i] for part in parts)
