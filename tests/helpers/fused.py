"""What quack-kernels does, spelled out in any dtype on a CPU, and runs that multiply by it however small they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pentode.ops import fused_products
from pentode.ops.fused_products import Functions
from pentode.optim import master
from tests.helpers.cases import Case, Outcome, train_case


def in_turn(x: Tensor, dim: int) -> Tensor:
    """Of two halves, the first's first, the second's first, the first's second, ..."""
    return torch.stack(x.chunk(2, dim), dim + 1).flatten(dim, dim + 1)


def halves(x: Tensor, dim: int) -> Tensor:
    """The inverse of `in_turn`."""
    return x.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def gated(a: Tensor, b: Tensor, *, activation: str, concat_layout: tuple[str, ...], **_: Any) -> tuple[Tensor, Tensor]:
    assert activation == "swiglu"
    assert concat_layout == ("B",)
    product = a @ in_turn(b, 1)
    return product, F.silu(product[:, ::2]) * product[:, 1::2]


def gated_backward(a: Tensor, b: Tensor, pre: Tensor, *, activation: str, **_: Any) -> tuple[Tensor, Tensor]:
    assert activation == "swiglu"
    with torch.enable_grad():
        leaf = pre.detach().requires_grad_()
        y = F.silu(leaf[:, ::2]) * leaf[:, 1::2]
        (grad,) = torch.autograd.grad(y, leaf, a @ b)
    return grad, y.detach()


def gated_gradient(a: Tensor, b: Tensor, pre: Tensor, *, out: dict[str, Tensor], **_: Any) -> None:
    out["D"].copy_(gated_backward(a, b, pre, activation="swiglu")[0])


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    of_label: None,
    loss: Tensor,
    log_total: Tensor,
    gradient: Tensor,
    weights: None,
    ignore: int,
) -> None:
    wide, valid = logits.double(), labels != ignore
    log_total.copy_(wide.logsumexp(1))
    hot = F.one_hot(labels.where(valid, 0), logits.shape[1])
    gradient.copy_((wide.softmax(1) - hot) * valid[:, None])


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    C: Tensor | None = None,
    *,
    config: object,
    alpha: float | Tensor = 1.0,
    add_to_output: bool = False,
    concat_layout: tuple[str, ...] = (),
) -> None:
    found = a @ (in_turn(b, 0) if "B" in concat_layout else b)
    found = alpha * (halves(found, 0) if "out" in concat_layout else found)
    out.copy_(found + (out if add_to_output else 0 if C is None else C))


PLAIN = Functions(gated, gated_backward, gated_gradient, product, lambda *numbers: numbers, cross_entropy)


@contextmanager
def served(calls: list[str]) -> Iterator[None]:
    """Have all bias-free products done by `PLAIN`, and all gradients that are added lie in sums; `calls` says which."""
    before = fused_products.PACKAGE.loaded, fused_products.serves, fused_products._best, master.TOGETHER

    def noted(name: str) -> Any:
        def call(*operands: Any, **options: Any) -> Any:
            does = f"{name}{' scaled' * ('alpha' in options)}{' added' * bool(options.get('add_to_output'))}"
            calls.append(does)
            return getattr(PLAIN, name)(*operands, **options)

        return call

    fused_products.PACKAGE.loaded = {None: Functions(*(noted(name) for name in PLAIN._fields))}
    fused_products.serves = lambda x, weight: True
    fused_products._best = lambda rows, columns, multiprocessors: fused_products.TILES[0]
    fused_products.devices.multiprocessors, counted = lambda device: 1, fused_products.devices.multiprocessors
    master.TOGETHER = 0
    try:
        yield
    finally:
        fused_products.PACKAGE.loaded, fused_products.serves, fused_products._best, master.TOGETHER = before
        fused_products.devices.multiprocessors = counted


def train_fused(case: Case) -> Outcome:
    """`train_case`, so; on every rank gradients must have been added to their sums."""
    calls: list[str] = []
    with served(calls):
        found = train_case(case)
    backward, other = ("gated_backward", "gated_gradient")[:: 1 if case.recompute == "activation" else -1]
    assert (backward in calls) == (case.tp == 1)
    assert other not in calls
    assert "product added" in calls or case.micro_batches == 1
    assert "product scaled" in calls or case.pp > 1  # where the head is
    return found
