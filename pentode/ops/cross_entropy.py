"""The passes of a cross-entropy over rows of logits: in plain form, and in one that is compiled to a kernel each.

n tokens, V entries of the vocabulary, of which the first `held` are real and the rest padding; the others may be on
other ranks, so a row's statistics come out first and its gradient second.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MOST_PRODUCTS = 5  # kept in their dtype until they are added up in one pass, whose kernel takes so many


class Passes(NamedTuple):
    """The passes over logits [n, V], in at least float32 whatever their dtype, and over products of one shape.

    statistics  (logits, held) -> of each row the maximum, and the sum of exponentials below it.  # 2 x [n]
    gradient_   (logits, held, log_total, factor, hot, row): in place, logits become exp(logits - log_total) * factor,
                less `hot` in the column `row`; log_total, factor, hot [n] and row [n] int64
    total_      (products, scale, into, add): in at least float32, the sum of a list of them times `scale` (0-d) is
                written into a tensor of their shape, or added to it
    whole_      (logits, held, labels, ignore, z_loss) -> log_total [n]: both at once, where no other rank has a part;
                in place, logits become exp(logits - log_total) * (1 + 2 z_loss log_total), less 1 in the label's
                column, and zero where the label [n] is `ignore`. None: there is no such pass
    """

    statistics: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    gradient_: Callable[[Tensor, int, Tensor, Tensor, Tensor, Tensor], None]
    total_: Callable[[list[Tensor], Tensor, Tensor, bool], None]
    whole_: Callable[[Tensor, int, Tensor, int, float], Tensor] | None = None


def _statistics(logits: Tensor, held: int) -> tuple[Tensor, Tensor]:
    real = _wide(logits)[:, :held]
    top = real.amax(dim=1)
    return top, (real - top[:, None]).exp_().sum(dim=1)


def _gradient_(logits: Tensor, held: int, log_total: Tensor, factor: Tensor, hot: Tensor, row: Tensor) -> None:
    grad = _wide(logits).sub_(log_total[:, None]).exp_().mul_(factor[:, None])
    grad[:, held:] = 0
    grad.scatter_add_(1, row[:, None], -hot[:, None])
    if grad is not logits:
        logits.copy_(grad)


def _gradient_to_compile_(
    logits: Tensor, held: int, log_total: Tensor, factor: Tensor, hot: Tensor, row: Tensor
) -> None:
    """`_gradient_` as one pass: a scatter would be a kernel of its own."""
    column = torch.arange(logits.shape[1], device=logits.device)
    grad = (_wide(logits) - log_total[:, None]).exp() * factor[:, None]
    grad = grad - torch.where(column == row[:, None], hot[:, None], 0)
    logits.copy_(torch.where(column < held, grad, 0))


def _total_(products: list[Tensor], scale: Tensor, into: Tensor, add: bool) -> None:
    first, *others = products
    total = _wide(first)
    for product in others:
        total = total + _wide(product)
    total = total * scale
    into.copy_(into + total if add else total)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


PLAIN = Passes(_statistics, _gradient_, _total_)
TO_COMPILE = Passes(_statistics, _gradient_to_compile_, _total_)
