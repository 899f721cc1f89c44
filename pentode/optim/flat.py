"""Flat buffers: parameters that are stepped and reduced alike, side by side, and the shards that this rank steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from pentode.dist.collectives import local_part
from pentode.dist.mesh import Axis
from pentode.optim.groups import Group
from pentode.optim.layout import ALIGN, Layout, lay_out
from pentode.parallel.spec import Box, ParamSpec

Span = tuple[int, int]  # elements [start, stop) of a group's buffers


@dataclass(eq=False)
class Shard:
    """What this rank steps at once, elements [start, stop) of a group's buffers: its part of a bucket, or the whole.

    Or one parameter, if its gradient is not moved into a buffer.

    weight        the master weights, at least float32; `model` itself where that is precise enough
    model         what the model computes with, of which this rank makes these elements
    gradient      the step's gradient, summed over micro-batches and `data` when `finish_gradients` has returned; where
                  it is not moved, no elements until backward has made it
    weight_decay  what the optimizer shrinks these weights by
    """

    start: int
    stop: int
    weight: Tensor
    model: Tensor
    gradient: Tensor
    weight_decay: float

    def round_(self) -> None:
        """Give the model the master weights, rounded to its dtype."""
        if self.model is not self.weight:
            self.model.copy_(self.weight)


Stepped = Callable[[Shard], object]  # called when a shard's new weights are under way


def nobody(shard: Shard) -> None:
    """Does nothing when a shard was stepped."""


@dataclass(frozen=True)
class FlatGroup:
    """Parameters that are stepped and reduced alike, side by side in buffers [N] of one layout.

    model     what the model computes with: its parameters are views of this buffer
    gradient  the step's gradient, of which only the shards are to be read once it is reduced; no elements if they are
              the parameters, whose gradients stay where backward makes them
    shards    what this rank steps: its part of each bucket, or everything at once
    foreign   spans of parameters that another rank of `model` owns: their gradient is counted there
    partial   spans whose gradient is a partial sum, each with the axis to sum it over
    """

    layout: Layout
    model: Tensor
    gradient: Tensor
    shards: list[Shard]
    foreign: list[Span] = field(default_factory=list)
    partial: list[tuple[Span, Axis]] = field(default_factory=list)

    @property
    def shares_storage(self) -> bool:
        """Whether the master weights are the model's own, so that there is nothing to round."""
        return self.shards[0].weight.dtype == self.model.dtype

    @property
    def moves_gradients(self) -> bool:
        """Whether gradients are moved into the buffer."""
        return self.gradient.numel() > 0

    def own_gradients(self) -> Iterator[Tensor]:
        """The gradients that this rank counts in the norm, shard by shard; padding, which is zero, is among them."""
        for shard in self.shards:
            at = shard.start
            for start, stop in [*self.foreign, (shard.stop, shard.stop)]:
                if at < min(start, shard.stop):
                    yield shard.gradient[at - shard.start : min(start, shard.stop) - shard.start]
                at = max(at, stop)

    def partial_gradients(self) -> Iterator[tuple[Tensor, Axis]]:
        """The parts of the shards' gradients that are partial sums, each with the axis to sum it over."""
        for shard in self.shards:
            for (start, stop), axis in self.partial:
                begin, end = max(start, shard.start), min(stop, shard.stop)
                if begin < end:
                    yield shard.gradient[begin - shard.start : end - shard.start], axis


def alike(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[Group], *, unmoved_from: int | None = None
) -> list[tuple[dict[str, nn.Parameter], float, bool]]:
    """The parameters parted by what a flat group has in common, each part in the model's order.

    With each its weight decay, and whether its gradients stay where backward makes them: those of at least
    `unmoved_from` elements. Parameters that other ranks share and sum up are apart, so that all who share them have one
    layout.
    """
    decay = {name: group.weight_decay for group in groups for name in group.names}
    assert decay.keys() >= parameters.keys(), f"in no group: {parameters.keys() - decay.keys()}"
    parts: dict[tuple[float, torch.dtype, str | None, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        axis = spec_of(parameter).sum_over
        shared = axis.name if axis is not None and axis.size > 1 else None
        size = parameter.numel()
        unmoved = unmoved_from is not None and size >= unmoved_from and size % ALIGN == 0
        parts.setdefault((decay[name], parameter.dtype, shared, unmoved), {})[name] = parameter
    return [(part, key[0], key[3]) for key, part in parts.items()]


@torch.no_grad()
def flatten(
    parameters: Mapping[str, nn.Parameter],
    weight_decay: float,
    *,
    shards: Axis,
    bucket_bytes: int,
    accumulate_in: torch.dtype,
    unmoved: bool = False,
) -> FlatGroup:
    """Move the parameters into new buffers, each bucket cut over the ranks of `shards`.

    Of `unmoved` gradients there is no buffer, and each parameter is a shard.
    """
    first = next(iter(parameters.values()))
    gradient_dtype = torch.promote_types(first.dtype, accumulate_in)
    layout = lay_out(
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        bucket_elements=bucket_bytes // gradient_dtype.itemsize,
        ranks=shards.size,
    )
    model = torch.zeros(layout.size, dtype=first.dtype, device=first.device)
    for name, view in layout.views(model).items():
        view.copy_(parameters[name])
        parameters[name].data = view
    gradient = model.new_zeros(0 if unmoved else layout.size, dtype=gradient_dtype)
    foreign, partial = _spans({name: spec_of(parameter) for name, parameter in parameters.items()}, layout)
    return FlatGroup(
        layout,
        model,
        gradient,
        _shards(_own(layout, model, shards, unmoved=unmoved), model, gradient, weight_decay),
        foreign=foreign,
        partial=partial,
    )


def spec_of(parameter: nn.Parameter) -> ParamSpec:
    """What a parameter made by `parallel.spec.parameter` is."""
    return parameter.spec  # pyright: ignore[reportAttributeAccessIssue]


def _own(layout: Layout, model: Tensor, axis: Axis, *, unmoved: bool) -> list[Tensor]:
    """What of the buffer this rank steps: its part of each bucket; all where none is cut; or parameter by parameter."""
    if unmoved:
        return [view.flatten() for view in layout.views(model).values()]
    return [local_part(part, axis) for part in layout.cut(model)] if axis.size > 1 else [model]


def _shards(own: list[Tensor], model: Tensor, gradient: Tensor, weight_decay: float) -> list[Shard]:
    """A shard for each part of the buffer, their master weights side by side in another."""
    wide = torch.promote_types(model.dtype, torch.float32)
    weights = own if wide == model.dtype else torch.cat(own).to(wide).split([part.numel() for part in own])
    spans = [(part.storage_offset(), part.storage_offset() + part.numel()) for part in own]
    return [
        Shard(start, stop, weight, part, gradient[start:stop], weight_decay)
        for (start, stop), weight, part in zip(spans, weights, own, strict=True)
    ]


def _spans(specs: Mapping[str, ParamSpec], layout: Layout) -> tuple[list[Span], list[tuple[Span, Axis]]]:
    """Where the buffers hold what another rank owns, and what is a partial sum; neighbours are one span."""
    foreign: list[Span] = []
    partial: list[tuple[Span, Axis]] = []
    for name, start in layout.starts.items():
        spec = specs[name]
        owned = spec.owned()
        foreign += [_span(box, spec, start) for box in spec.boxes() if box not in owned]
        partial += [(_span(box, spec, start), axis) for box, axis in spec.partial()]
    return foreign, partial


def _span(box: Box, spec: ParamSpec, start: int) -> Span:
    """The elements of the buffer that are a box of the parameter that begins at `start`."""
    row = prod(spec.local_shape[1:])
    assert box.shape[1:] == spec.local_shape[1:], f"{box} is not whole rows of {spec.local_shape}"
    first = start + box.local_start[0] * row
    return first, first + box.shape[0] * row
