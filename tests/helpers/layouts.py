"""One global tensor as the ranks of many layouts hold it: drawn by hypothesis, with pieces, copies and padding."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from pentode.dist.mesh import Axis
from pentode.parallel.spec import Cut, ParamSpec


@dataclass(frozen=True)
class Parameter:
    """A global tensor, and how it may be cut over tp: `dim` is made of pieces, each of heads that are `width` wide.

    Without heads it is a vocabulary, which is padded at its end; without a dim it is never cut.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    heads: tuple[int, ...] = ()
    width: int = 1

    def may_be_cut(self, tp: int) -> bool:
        return all(count % tp == 0 or tp % count == 0 for count in self.heads)

    def spec(self, tp: int, rank: int, *, padding: int = 0) -> ParamSpec:
        """What a tp rank holds; `padding` is how many rows more than needed a vocabulary is padded by on each rank."""
        axis = Axis("tp", tp, rank)
        if self.dim is None:
            return ParamSpec(self.shape, copies=axis)
        if not self.heads:
            padded = (-(-self.shape[self.dim] // tp) + padding) * tp
            return ParamSpec(self.shape, Cut(self.dim, axis, (padded,)))
        copies = [tp // count if tp > count else 1 for count in self.heads]
        axes = tuple(Axis("tp_kv", size, rank % size) if size > 1 else None for size in copies)
        return ParamSpec(self.shape, Cut(self.dim, axis, tuple(self.width * count for count in self.heads), axes))


@st.composite
def parameters(draw: st.DrawFn) -> Parameter:
    """Any parameter of up to three dims."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    dim = draw(st.none() | st.integers(0, min(1, len(shape) - 1)))
    if dim is None or draw(st.booleans()):
        return Parameter(tuple(shape), dim)
    heads = draw(st.lists(st.sampled_from((1, 2, 4, 6)), min_size=1, max_size=3))
    width = draw(st.integers(1, 2))
    shape[dim] = width * sum(heads)
    return Parameter(tuple(shape), dim, tuple(heads), width)


@st.composite
def layouts(draw: st.DrawFn, parameter: Parameter) -> list[tuple[ParamSpec, int, int]]:
    """What each rank of a grid data x tp holds: the spec of its tp rank, and which elements of that tensor."""
    tp = draw(st.sampled_from([size for size in (1, 2, 3, 4) if parameter.may_be_cut(size)]))
    padding = draw(st.integers(0, 1))
    specs = [parameter.spec(tp, rank, padding=padding) for rank in range(tp)]
    size = torch.Size(specs[0].local_shape).numel()
    inner = draw(st.lists(st.integers(0, size), max_size=3))
    return [(spec, start, stop) for start, stop in pairwise(sorted([0, size, *inner])) for spec in specs]


def numbered(shape: tuple[int, ...]) -> Tensor:
    """A tensor of which each element is another number, and none is zero, as padding is."""
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
