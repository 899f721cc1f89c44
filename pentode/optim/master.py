"""Master weights: the flat buffers that hold all weights and gradients, and how gradients get there (design 1.9)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pentode.dist.collectives import start_sum_, sum_
from pentode.dist.mesh import Axis
from pentode.optim.groups import Group
from pentode.optim.layout import Layout, lay_out
from pentode.parallel.spec import ParamSpec


@dataclass(frozen=True)
class FlatGroup:
    """Parameters that are stepped and reduced alike, side by side in buffers [N] of one layout.

    model         what the model computes with: its parameters are views of this buffer
    weight        the master weights, at least float32; the same tensor as `model` where that is precise enough
    gradient      the step's gradient, summed over micro-batches
    weight_decay  what the optimizer shrinks these weights by
    cut           whether each tensor-parallel rank holds its own part of these parameters, rather than a copy
    sum_over      the axis over which `gradient` is a partial sum until `finish_gradients`, if it is one
    """

    layout: Layout
    model: Tensor
    weight: Tensor
    gradient: Tensor
    weight_decay: float
    cut: bool
    sum_over: Axis | None


@dataclass
class _Reduction:
    """A bucket of gradients on its way to the sum over `data`; `missing` parameters still wait for micro-batches."""

    gradient: Tensor
    names: tuple[str, ...]
    missing: int = 0


class MasterWeights:
    """All parameters of this rank in flat buffers; every rank of `data` holds all of them (ZeRO-0).

    parameters     by name, in the model's order; each becomes a view of the model buffer and keeps its values
    groups         which parameters are stepped alike; every name is in one group
    data           the axis that gradients are summed over
    bucket_bytes   gradient bytes from which a bucket is full and reduced on its own
    accumulate_in  dtype of the gradients, where the parameter's own is not wider

    As soon as backward has made a parameter's gradient it is moved into its place in the gradient buffer, and `.grad`
    is None again: the step's first micro-batch writes, later ones add. A bucket whose last gradient has arrived is
    reduced while backward goes on.

    Masters are float32 (float64 for float64 parameters) whatever gradients are accumulated in. Nanotron without
    `accumulate_grad_in_fp32` has none and steps bfloat16 weights directly, which loses most small updates.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        groups: Sequence[Group],
        data: Axis,
        bucket_bytes: int,
        accumulate_in: torch.dtype,
    ) -> None:
        self.data = data
        self.flat: list[FlatGroup] = []
        self.weights: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self._arrivals = dict.fromkeys(parameters, 0)
        self._micro_batches = 0
        reductions: list[tuple[int, _Reduction]] = []
        places = {name: i for i, name in enumerate(parameters)}
        for alike, weight_decay in _alike(parameters, groups):
            flat = _flatten(alike, weight_decay, data=data, bucket_bytes=bucket_bytes, accumulate_in=accumulate_in)
            self.flat.append(flat)
            self.weights |= flat.layout.views(flat.weight)
            self.gradients |= flat.layout.views(flat.gradient)
            for bucket, gradient in zip(flat.layout.buckets, flat.layout.cut(flat.gradient), strict=True):
                reductions.append((places[bucket.names[0]], _Reduction(gradient, bucket.names)))
        # Ranks must reduce in one order: backward's, where a bucket waits for the first of its parameters in the model.
        self._reductions = [reduction for _, reduction in sorted(reductions, key=lambda pair: -pair[0])]
        self._works: list[torch.distributed.Work] = []
        self._started = 0
        for reduction in self._reductions:
            for name in reduction.names:
                parameters[name].register_post_accumulate_grad_hook(self._receiver(name, reduction))

    @property
    def shares_storage(self) -> bool:
        """Whether the master weights are the model's weights, so that there is nothing to publish."""
        return all(flat.weight is flat.model for flat in self.flat)

    def start_step(self, micro_batches: int) -> None:
        """Expect gradients of this many micro-batches; the last step's gradients are given up."""
        self._micro_batches = micro_batches
        self._arrivals = dict.fromkeys(self._arrivals, 0)
        self._started = 0
        for reduction in self._reductions:
            reduction.missing = len(reduction.names)

    def finish_gradients(self) -> None:
        """Complete the step's gradients: zero for what got none, and the sum over all ranks for the rest."""
        for name, count in self._arrivals.items():
            if count == 0:
                self.gradients[name].zero_()
        for reduction in self._reductions:
            reduction.missing = 0
        self._start_complete()
        for work in self._works:
            work.wait()
        self._works.clear()
        for flat in self.flat:
            if flat.sum_over is not None:
                sum_(flat.gradient, flat.sum_over)

    @torch.no_grad()
    def publish(self) -> None:
        """Give the model the master weights, rounded to its dtype."""
        for flat in self.flat:
            if flat.weight is not flat.model:
                flat.model.copy_(flat.weight)

    @torch.no_grad()
    def adopt_weights(self) -> None:
        """Take the model's weights, just read from elsewhere, as master weights."""
        for flat in self.flat:
            if flat.weight is not flat.model:
                flat.weight.copy_(flat.model)

    def bytes(self) -> int:
        """Memory held by weights, master weights and gradients."""
        tensors = {id(t): t for flat in self.flat for t in (flat.model, flat.weight, flat.gradient)}
        return sum(tensor.nbytes for tensor in tensors.values())

    def _receiver(self, name: str, reduction: _Reduction) -> Callable[[Tensor], None]:
        """The hook that autograd calls with the parameter, once per backward, when its gradient is complete."""
        into = self.gradients[name]

        def receive(parameter: Tensor) -> None:
            count = self._arrivals[name] = self._arrivals[name] + 1
            expected = self._micro_batches
            assert count <= expected, f"{name}: gradient {count} of a step of {expected} micro-batches; call start_step"
            gradient = parameter.grad
            if gradient is None:  # the hook fires for a gradient that is None, too
                if count == 1:
                    into.zero_()
            elif count == 1:
                into.copy_(gradient)
            else:
                into.add_(gradient)
            parameter.grad = None
            if count == expected:
                reduction.missing -= 1
                if not reduction.missing:
                    self._start_complete()

        return receive

    def _start_complete(self) -> None:
        """Start to reduce the buckets that are complete, but none before its turn."""
        while self._started < len(self._reductions) and not self._reductions[self._started].missing:
            work = start_sum_(self._reductions[self._started].gradient, self.data)
            if work is not None:
                self._works.append(work)
            self._started += 1


def _alike(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[Group]
) -> list[tuple[dict[str, nn.Parameter], float]]:
    """The parameters parted by all that a flat group has in common, each part in the model's order."""
    decay = {name: group.weight_decay for group in groups for name in group.names}
    assert decay.keys() == parameters.keys(), f"in groups or parameters only: {decay.keys() ^ parameters.keys()}"
    parts: dict[tuple[object, ...], dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        cut, sum_over = _cut(parameter), _sum_over(parameter)
        parts.setdefault((decay[name], parameter.dtype, cut, sum_over), {})[name] = parameter
    return [(part, decay[next(iter(part))]) for part in parts.values()]


@torch.no_grad()
def _flatten(
    parameters: Mapping[str, nn.Parameter],
    weight_decay: float,
    *,
    data: Axis,
    bucket_bytes: int,
    accumulate_in: torch.dtype,
) -> FlatGroup:
    """Move the parameters into new buffers."""
    first = next(iter(parameters.values()))
    gradient_dtype = torch.promote_types(first.dtype, accumulate_in)
    layout = lay_out(
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        bucket_elements=bucket_bytes // gradient_dtype.itemsize,
        ranks=data.size,
    )
    model = torch.zeros(layout.size, dtype=first.dtype, device=first.device)
    for name, view in layout.views(model).items():
        view.copy_(parameters[name])
        parameters[name].data = view
    return FlatGroup(
        layout,
        model=model,
        weight=model.to(torch.promote_types(first.dtype, torch.float32)),  # the same tensor where that is its dtype
        gradient=torch.zeros_like(model, dtype=gradient_dtype),
        weight_decay=weight_decay,
        cut=_cut(first),
        sum_over=_sum_over(first),
    )


def _spec(parameter: nn.Parameter) -> ParamSpec:
    return parameter.spec  # pyright: ignore[reportAttributeAccessIssue]


def _cut(parameter: nn.Parameter) -> bool:
    cut = _spec(parameter).cut
    return cut is not None and cut.axis.size > 1


def _sum_over(parameter: nn.Parameter) -> Axis | None:
    axis = _spec(parameter).sum_over
    return axis if axis is not None and axis.size > 1 else None
