"""Which optimizer each kind of arguments builds."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from pentode.config.kinds.optimizers import AdamWOptimizerArgs, SGDOptimizerArgs
from pentode.optim.adamw import AdamW
from pentode.optim.flat import Shard
from pentode.optim.sgd import SGD


class Optimizer(Protocol):
    """Steps a rank's shards in place.

    updates  0-d float32 on the device: updates made so far. With `state()`, all that a checkpoint must hold
    """

    updates: Tensor

    def step(self, *, learning_rate: float, scale: Tensor, finite: Tensor) -> None:
        """One update with gradient * scale; where `finite` is False nothing changes, and nothing waits for the host."""

    def state(self) -> dict[str, list[Tensor]]:
        """The optimizer's tensors by kind, one beside each shard; writing into them restores it."""
        ...


def build_optimizer(args: object, shards: Sequence[Shard]) -> Optimizer:
    """The optimizer that `args` describes, for what this rank steps."""
    return _BUILDERS[type(args)](args, shards)


def _adamw(args: AdamWOptimizerArgs, shards: Sequence[Shard]) -> AdamW:
    betas = (args.adam_beta1, args.adam_beta2)
    return AdamW(shards, betas=betas, eps=args.adam_eps, use_fused=args.torch_adam_is_fused)


def _sgd(args: SGDOptimizerArgs, shards: Sequence[Shard]) -> SGD:
    return SGD(shards)


_BUILDERS: dict[type, Callable[[Any, Sequence[Shard]], Optimizer]] = {
    AdamWOptimizerArgs: _adamw,
    SGDOptimizerArgs: _sgd,
}
