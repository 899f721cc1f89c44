"""Which optimizer each kind of arguments builds."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from pentode.config.kinds.optimizers import AdamWOptimizerArgs, SGDOptimizerArgs
from pentode.optim.adamw import AdamW
from pentode.optim.master import FlatGroup
from pentode.optim.sgd import SGD


class Optimizer(Protocol):
    """Steps flat groups in place.

    updates  0-d float32 on the device: updates made so far. With `state()`, all that a checkpoint must hold
    """

    updates: Tensor

    def step(self, *, learning_rate: float, scale: Tensor, finite: Tensor) -> None:
        """One update with gradient * scale; where `finite` is False nothing changes, and nothing waits for the host."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Views of the optimizer's tensors by parameter name and kind; writing into them restores it."""
        ...


def build_optimizer(args: object, flat: Sequence[FlatGroup]) -> Optimizer:
    """The optimizer that `args` describes."""
    return _BUILDERS[type(args)](args, flat)


def _adamw(args: AdamWOptimizerArgs, flat: Sequence[FlatGroup]) -> AdamW:
    betas = (args.adam_beta1, args.adam_beta2)
    return AdamW(flat, betas=betas, eps=args.adam_eps, use_fused=args.torch_adam_is_fused)


def _sgd(args: SGDOptimizerArgs, flat: Sequence[FlatGroup]) -> SGD:
    return SGD(flat)


_BUILDERS: dict[type, Callable[[Any, Sequence[FlatGroup]], Optimizer]] = {
    AdamWOptimizerArgs: _adamw,
    SGDOptimizerArgs: _sgd,
}
