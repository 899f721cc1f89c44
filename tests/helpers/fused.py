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


PLAIN = Functions(gated, gated_backward, product, lambda *numbers: numbers)


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
    assert "gated_backward" in calls or case.tp > 1
    assert "product added" in calls or case.micro_batches == 1
    assert "product scaled" in calls or case.pp > 1  # where the head is
    return found
