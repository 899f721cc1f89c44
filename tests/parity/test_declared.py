"""What the docstring of each parallel primitive says of its messages is what a recorder counts when it runs."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pentode.dist import collectives, p2p
from pentode.dist.mesh import Axis, Mesh
from pentode.nn import norm
from pentode.parallel import tensor, tensor_overlap
from pentode.parallel.loss import Vocab, vocab_logits, vocab_loss
from pentode.parallel.tensor import ColumnLinear, Place, RowLinear, VocabEmbedding
from tests.helpers.world import WORLD

T, D, F, V = 8, 12, 16, 20
OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter")
BELOW = {"_reduce": "all-reduce", "_join": "all-gather", "_sum_and_split": "reduce-scatter", "start_sum_": "all-reduce"}
Found = tuple[Counter[str], Counter[str]]  # forward, backward


@contextmanager
def recording(axis: Axis) -> Iterator[Counter[str]]:
    """Counts what is sent: collectives by name, and pieces passed on around a ring by the direction of their sum.

    What is sent on another axis counts under another name.
    """
    sent: Counter[str] = Counter()

    def counting(name: str, send: Callable[..., Any]) -> Callable[..., Any]:
        def counted(x: Tensor, on: Axis | str, *args: Any, **kwargs: Any) -> Any:
            own = on == axis if isinstance(on, Axis) else on == collectives._name(axis)
            sent[name if own else f"{name} on {on}"] += 1
            return send(x, on, *args, **kwargs)

        return counted

    class CountedRing(p2p.Ring):
        def start(self, x: Tensor, *, hop: int, into: Tensor) -> p2p.Receipt:
            # axis.size - 1 pieces make one collective: of the same tensor to all a gather, of one for each a scatter
            kind = "all-gather" if x.data_ptr() in self.gathered else "reduce-scatter"
            sent[kind if self.axis == axis else f"{kind} on {self.axis}"] += 1 / (axis.size - 1)
            return super().start(x, hop=hop, into=into)

        gathered: set[int] = set()

    def gather(ring: CountedRing, x: Tensor, whole: Tensor) -> list[tuple[int, p2p.Receipt]]:
        CountedRing.gathered = {x.data_ptr()}
        return start_gather(ring, x, whole)

    start_gather = tensor_overlap._start_gather
    with pytest.MonkeyPatch.context() as patch:
        for name, operation in BELOW.items():
            patch.setattr(collectives, name, counting(operation, getattr(collectives, name)))
        patch.setattr(tensor_overlap, "start_sum_", counting("all-reduce", tensor_overlap.start_sum_))
        patch.setattr(tensor_overlap, "Ring", CountedRing)
        patch.setattr(tensor_overlap, "_start_gather", gather)
        yield sent


def count(run: Callable[[Tensor], Tensor], x: Tensor, axis: Axis) -> Found:
    """What `run` sends forward, and backward."""
    with recording(axis) as sent:
        y = run(x)
        forward = Counter(sent)
        sent.clear()
        if y.requires_grad:
            y.backward(torch.ones_like(y))
        return forward, Counter(sent)


def declared(docstring: str | None, *, sequence_parallel: bool = False) -> Found:
    """What a docstring's lines `forward` and `backward` name; where both ways stand, the one after the bar if asked."""
    assert docstring
    found = []
    for word in ("forward", "backward"):
        match = re.search(rf"^ *{word}  ?(.*?)(?=^ *(?:forward|backward|gradient)  |^\s*$|\Z)", docstring, re.M | re.S)
        assert match, f"no line `{word}` in {docstring}"
        columns = [line.split("|") for line in match[1].splitlines()]
        two = any(len(line) == 2 for line in columns)
        text = " ".join(line[-1] if two and sequence_parallel else line[0] for line in columns)
        text = re.split(r"; with `gather_again`", text)[0]
        found.append(Counter({name: text.count(name) for name in OPERATIONS if name in text}))
    return found[0], found[1]


def _looked_up(table: VocabEmbedding, _: Tensor) -> Tensor:
    return table(torch.arange(T))


def every_primitive() -> dict[str, tuple[Found, Found]]:
    """Name -> (declared, counted), on this rank."""
    mesh = Mesh.build(tp=4)
    tp, found = mesh.tp, {}
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    for function in (collectives.replicate, collectives.all_reduce, collectives.all_gather, collectives.reduce_scatter):
        found[function.__name__] = declared(function.__doc__), count(lambda x, f=function: f(x, tp), numbers(T, D), tp)
    found["all_max"] = (
        declared(collectives.all_max.__doc__),
        count(lambda x: collectives.all_max(x, tp), numbers(T), tp),
    )
    for cut in (False, True):
        way = " under sequence parallelism" if cut else ""
        place = Place(tp, torch.device("cpu"), torch.float64, sequence_parallel=cut)
        local = T // 4 if cut else T
        layers: dict[type, tuple[Callable[[Tensor], Tensor], Tensor]] = {
            ColumnLinear: (ColumnLinear(D, (F,), place=place), numbers(local, D)),
            RowLinear: (RowLinear(F, D, place=place, bias=True), numbers(T, F // 4)),
            VocabEmbedding: (partial(_looked_up, VocabEmbedding(V, D, padded=V, place=place)), numbers(1)),
        }
        for kind, (layer, x) in layers.items():
            found[kind.__name__ + way] = declared(kind.__doc__, sequence_parallel=cut), count(layer, x, tp)
        found["Place.enter" + way] = (
            declared(Place.enter.__doc__, sequence_parallel=cut),
            count(place.enter, numbers(local, D), tp),
        )
        found["Place.leave" + way] = (
            declared(Place.leave.__doc__, sequence_parallel=cut),
            count(place.leave, numbers(T, D), tp),
        )
        layer = norm.RMSNorm(D, 1e-5, place=place)
        found["RMSNorm" + way] = declared(norm.__doc__), count(layer, numbers(local, D), tp)
    vocab, table = Vocab(V, tp), numbers(V // 4, D)
    found["vocab_logits"] = (
        declared(vocab_logits.__doc__),
        count(lambda x: vocab_logits(x, table, vocab=vocab), numbers(T, D), tp),
    )
    three = re.search(r"forward +all-reduce .*, three times a slice", vocab_loss.__doc__ or "")
    _, after = declared(vocab_loss.__doc__)
    found["vocab_loss"] = (
        (Counter({"all-reduce": 3 if three else 0}), after),
        count(lambda x: vocab_loss(x, table, torch.arange(T), vocab=vocab), numbers(T, D), tp),
    )
    weight, row = numbers(F // 4, D), numbers(D, F // 4)
    overlapped = {
        tensor_overlap.gathered_linear: (
            lambda x: tensor_overlap.gathered_linear(x, weight, tp, gather_again=False),
            numbers(T // 4, D),
        ),
        tensor_overlap.scattered_linear: (lambda x: tensor_overlap.scattered_linear(x, row, tp), numbers(T, F // 4)),
        tensor_overlap.replicated_linear: (lambda x: tensor_overlap.replicated_linear(x, weight, tp), numbers(T, D)),
    }
    for function, (run, x) in overlapped.items():
        found[function.__name__] = declared(function.__doc__), count(run, x, tp)
    again = Counter({"all-gather": 1})
    for name, run in {
        "gathered_linear again": lambda x: tensor_overlap.gathered_linear(x, weight, tp, gather_again=True),
        "ColumnLinear again": lambda x: tensor._GatheringLinear.apply(x, weight, tp),
    }.items():
        forward, backward = declared(ColumnLinear.__doc__, sequence_parallel=True)
        found[name] = (forward, backward + again), count(run, numbers(T // 4, D), tp)
    return found


def test_docstrings_declare_what_a_recorder_counts() -> None:
    for found in WORLD.run(every_primitive, 4):
        assert len(found) >= 20
        for name, ((forward, backward), counted) in found.items():
            assert counted == (forward, backward), f"{name}: declared {forward}, then {backward}; counted {counted}"
