"""Which optimizer each kind of arguments builds."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from pentode.config.kinds.optimizers import AdamWOptimizerArgs, SGDOptimizerArgs
from pentode.optim.adamw import AdamW, Update
from pentode.optim.flat import Shard, Stepped
from pentode.optim.sgd import SGD


class Optimizer(Protocol):
    """Steps a rank's shards in place.

    updates  0-d float32 on the device: updates made so far. With `state()`, all that a checkpoint must hold
    """

    updates: Tensor

    def step(self, *, learning_rate: float | Tensor, scale: Tensor, finite: Tensor, stepped: Stepped = ...) -> None:
        """One update with gradient * scale; where `finite` is False nothing changes, and nothing waits for the host.

        Shard by shard: the new weights go to `weight` and, rounded, to `model`; then `stepped` is called with it.
        """
        ...

    def state(self) -> dict[str, list[Tensor]]:
        """The optimizer's tensors by kind, one beside each shard; writing into them restores it."""
        ...


def build_optimizer(args: object, shards: Sequence[Shard], *, adamw_update: Update | None = None) -> Optimizer:
    """The optimizer that `args` describes, for what this rank steps; `adamw_update` is AdamW's in one kernel."""
    return _BUILDERS[type(args)](args, shards, adamw_update)


def _adamw(args: AdamWOptimizerArgs, shards: Sequence[Shard], update: Update | None) -> AdamW:
    betas = (args.adam_beta1, args.adam_beta2)
    return AdamW(shards, betas=betas, eps=args.adam_eps, use_fused=args.torch_adam_is_fused, update=update)


def _sgd(args: SGDOptimizerArgs, shards: Sequence[Shard], _: Update | None) -> SGD:
    return SGD(shards)


_BUILDERS: dict[type, Callable[[Any, Sequence[Shard], Update | None], Optimizer]] = {
    AdamWOptimizerArgs: _adamw,
    SGDOptimizerArgs: _sgd,
}
