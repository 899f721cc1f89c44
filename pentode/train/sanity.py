"""What must hold between ranks, checked at every step where `general.ignore_sanity_checks` is false.

The invariants are Nanotron's, for every axis on which ranks hold copies. Ranks compare hashes of tensors' bits, so that
a check sends a few numbers and never a tensor; it reads every weight and gradient, and waits for the host.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pentode.dist import collectives
from pentode.dist.mesh import Axis
from pentode.errors import SanityError
from pentode.parallel.batch import Batch
from pentode.parallel.spec import Box, ParamSpec, specs_of
from pentode.run.build import Run

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 1 << 22  # elements hashed at a time, as int64


class Copy(NamedTuple):
    """A tensor that all ranks of an axis should hold alike."""

    axis: Axis
    name: str
    tensor: Tensor


def check_batches(run: Run, batches: Sequence[Batch]) -> None:
    """The ranks that hold one model read the same micro-batches, and different replicas read different samples."""
    if run.config.general.ignore_sanity_checks:
        return
    for i, batch in enumerate(batches):
        for name in ("tokens", "labels", "positions", "samples"):
            _compare([Copy(run.mesh.model, f"{name} of micro-batch {i}", getattr(batch, name))])
    samples = torch.cat([batch.samples for batch in batches])
    everywhere = collectives.all_gather(samples, run.mesh.dp)
    if everywhere.unique().numel() < everywhere.numel():
        raise SanityError("sanity check: two dp ranks read one sample of this step; the data's order is broken")


def check_gradients(run: Run) -> None:
    """After backward and all sums: every gradient came, is finite, and is the same on all ranks that hold a copy."""
    if run.config.general.ignore_sanity_checks:
        return
    master, mesh = run.master, run.mesh
    missing = master.missing()
    if missing:
        raise SanityError(f"sanity check: {missing[0]} got no gradient on {_here(run)}; it takes no part in the loss")
    parts = master.by_name([shard.gradient for shard in master.shards])
    for name, found in parts.items():
        if not all(bool(part.isfinite().all()) for _, part in found):
            raise SanityError(f"sanity check: the gradient of {name} is not finite on {_here(run)}")
    if not master.sharded:
        gradients = master.gradients
        _compare(Copy(mesh.data, f"gradient of {name}", gradient) for name, gradient in gradients.items())
        _compare(_copies(run, gradients, "gradient of "))


def check_weights(run: Run) -> None:
    """Before and after an update: copies of weights are equal, masters round to them, states agree, `.grad` is free."""
    if run.config.general.ignore_sanity_checks:
        return
    master, mesh = run.master, run.mesh
    master.wait_for()
    parameters = {name: p for stage in run.stages.values() for name, p in stage.named_parameters()}
    weights = {name: p.detach() for name, p in parameters.items()}
    _compare(Copy(mesh.data, name, weight) for name, weight in weights.items())
    _compare(_copies(run, weights, ""))
    for name, parts in master.by_name([shard.weight for shard in master.shards]).items():
        flat = weights[name].flatten()
        for start, part in parts:
            if not torch.equal(part.to(flat.dtype), flat[start : start + part.numel()]):
                raise SanityError(f"sanity check: {name} is not its master weight, rounded, on {_here(run)}")
    if not master.sharded:
        for kind, tensors in run.optimizer.state().items():
            by_name = master.by_name(tensors).items()
            _compare(Copy(mesh.data, f"{kind} of {name}", part) for name, parts in by_name for _, part in parts)
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            raise SanityError(f"sanity check: {name} kept a gradient outside the gradient buffer on {_here(run)}")


def _copies(run: Run, tensors: dict[str, Tensor], what: str) -> Iterator[Copy]:
    """The parts of these local tensors that other ranks of the model hold, too."""
    specs: dict[str, ParamSpec] = {}
    for stage in run.stages.values():
        specs |= specs_of(stage)
    for name, spec in specs.items():
        if spec.copies is not None and spec.copies.size > 1:
            yield Copy(spec.copies, what + name, tensors[name])
        elif spec.sum_over is None:
            for box, axis in spec.partial():
                yield Copy(axis, f"{what}{name}{_place(box)}", box.of_local(tensors[name]))


def _compare(copies: Iterator[Copy] | Sequence[Copy]) -> None:
    """Raise SanityError for the first tensor that ranks of its axis hold differently."""
    by_axis: dict[str, list[Copy]] = {}
    for copy in copies:
        if copy.axis.size > 1:
            by_axis.setdefault(copy.axis.name, []).append(copy)
    for name, found in by_axis.items():
        hashes = torch.stack([_hash(copy.tensor) for copy in found])
        table = collectives.all_gather(hashes[None], found[0].axis)  # [ranks, tensors]
        differ = (table != table[0]).any(dim=0)
        if bool(differ.any()):
            place = int(differ.nonzero()[0])
            ranks = (table[:, place] != table[0, place]).nonzero()[:, 0].tolist()
            others = f"{name} rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
            raise SanityError(f"sanity check: {found[place].name} differs between {name} rank 0 and {others}")


def _hash(x: Tensor) -> Tensor:
    """A hash of a tensor's bits and their places, 0-d int64; it does not wait for the host."""
    bits = x.contiguous().flatten().view(INTEGERS[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].long()
        places = torch.arange(start, start + part.numel(), device=x.device)
        total += ((part + 1) * (places * 0x9E3779B1 + 0x7F4A7C15)).sum()
    return total


def _place(box: Box) -> str:
    return f"[{box.global_start[0]}:{box.global_start[0] + box.shape[0]}]"


def _here(run: Run) -> str:
    mesh = run.mesh
    return ", ".join(f"{axis.name} rank {axis.rank}" for axis in (mesh.pp, mesh.dp, mesh.tp))
