"""What must hold between ranks, checked at every step where `general.ignore_sanity_checks` is false.

The invariants are Nanotron's, for every axis on which ranks hold copies. Ranks compare hashes of tensors' bits, so that
a check sends a few numbers and never a tensor; it reads every weight and gradient, and waits for the host. What one
rank finds, all of them raise: none is left waiting for another.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pentode import log
from pentode.dist import collectives
from pentode.dist.mesh import Axis
from pentode.dist.together import ranks_in_words
from pentode.errors import SanityError
from pentode.ops.random import bits
from pentode.optim.master import MasterWeights
from pentode.parallel.batch import Batch
from pentode.parallel.spec import Box, ParamSpec, specs_of
from pentode.run.build import Run
from pentode.train.state import TrainState, beside_shards

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 1 << 22  # elements hashed at a time, as int64


class Copy(NamedTuple):
    """A tensor that all ranks of an axis should hold alike."""

    axis: Axis
    name: str
    tensor: Tensor


def check_batches(run: Run, batches: Sequence[Batch]) -> None:
    """The ranks that hold one model read the same micro-batches, and different replicas read different samples.

    Tokens that come to two replicas under different numbers are logged and end nothing: a text may repeat itself.
    """
    if run.config.general.ignore_sanity_checks:
        return
    parts = ("tokens", "labels", "positions", "samples")
    copies = [
        Copy(run.mesh.model, f"{part} of micro-batch {i}", getattr(batch, part))
        for i, batch in enumerate(batches)
        for part in parts
    ]
    tokens, samples = _read(run, batches)
    broken = [f"{text}; the data's order is broken" for text in _twice("a sample", samples, run)]
    _raise_everywhere([*_differences(copies), *broken], run.mesh.world)
    for text in _twice("all tokens", tokens, run):
        log.once(f"Sanity check: {text}: the text repeats itself, or the data's order is broken", key="tokens twice")


def check_gradients(run: Run) -> None:
    """After backward and all sums: every gradient came, is finite, and is the same on all ranks that hold a copy."""
    if run.config.general.ignore_sanity_checks:
        return
    master, here = run.master, _here(run)
    gradients = [shard.gradient for shard in master.shards]
    found = [f"{name} got no gradient on {here}; it takes no part in the loss" for name in master.missing()]
    for name, parts in master.by_name(gradients).items():
        if not all(bool(part.isfinite().all()) for _, part in parts):
            found.append(f"the gradient of {name} is not finite on {here}")
    differences = _differences(_copies(run, _in_shape(master, gradients), what="the gradient of "))
    _raise_everywhere(differences, run.mesh.world, first=found)


def check_weights(run: Run) -> None:
    """Between steps: weights, masters, the optimizer's states are the same wherever there are copies, `.grad` is free.

    And the weights are their masters, rounded.
    """
    if run.config.general.ignore_sanity_checks:
        return
    master, here = run.master, _here(run)
    master.wait_for()
    parameters = {name: p for stage in run.stages.values() for name, p in stage.named_parameters()}
    weights = {name: p.detach() for name, p in parameters.items()}
    found = [
        f"{name} kept a gradient outside the gradient buffer on {here}"
        for name, parameter in parameters.items()
        if parameter.grad is not None
    ]
    for name, parts in master.by_name([shard.weight for shard in master.shards]).items():
        flat = weights[name].flatten()
        for start, part in parts:
            if not torch.equal(part.to(flat.dtype), flat[start : start + part.numel()]):
                found.append(f"{name} is not its master weight, rounded, on {here}")
    differences = _differences([Copy(run.mesh.world, "the count of updates", run.optimizer.updates)])
    differences += _differences(_copies(run, weights.__getitem__, what="", everywhere=True))
    for kind, tensors in beside_shards(run).items():
        differences += _differences(_copies(run, _in_shape(master, tensors), what=f"{kind} of "))
    _raise_everywhere(differences, run.mesh.world, first=found)


def check_state(run: Run, state: TrainState) -> None:
    """Before a checkpoint is written: all ranks stand at the same step and at the same place in the data."""
    if run.config.general.ignore_sanity_checks:
        return
    first, *others = collectives.gather_objects(asdict(state), run.mesh.world)
    _raise_everywhere(
        [
            f"{key} is {first[key]} on rank 0, {other[key]} on rank {rank}"
            for rank, other in enumerate(others, 1)
            for key in first
            if other[key] != first[key]
        ],
        run.mesh.world,
    )


def _read(run: Run, batches: Sequence[Batch]) -> tuple[list[list[int]], list[list[int]]]:
    """What each replica reads in this step: a hash of all its tokens, and its samples' numbers."""
    tokens = _hash(torch.cat([batch.tokens for batch in batches]))
    samples = torch.cat([batch.samples for batch in batches])
    rows = collectives.all_gather(torch.cat((tokens[None], samples))[None], run.mesh.dp).tolist()  # [dp, 1 + samples]
    return [row[:1] for row in rows], [row[1:] for row in rows]


def _twice(what: str, values: Sequence[Sequence[int]], run: Run) -> Iterator[str]:
    """To whom the first of the replicas' values came twice, if one did."""
    reader: dict[int, int] = {}
    members = _members(run.mesh.dp) or [run.mesh.world.rank]
    for rank, value in ((rank, value) for rank, own in zip(members, values, strict=True) for value in own):
        if value in reader:
            yield f"{what} of this step came twice, to {ranks_in_words(sorted({reader[value], rank}))}"
            return
        reader[value] = rank


def _copies(run: Run, held: Callable[[str], Tensor], *, what: str, everywhere: bool = False) -> Iterator[Copy]:
    """What this rank holds of each parameter, on every axis whose ranks hold all or a part of it alike.

    Those are the ranks of data, too, but under ZeRO only of what they hold `everywhere`.
    """
    specs: dict[str, ParamSpec] = {}
    for stage in run.stages.values():
        specs |= specs_of(stage)
    for name, spec in specs.items():
        if everywhere or not run.master.sharded:
            yield Copy(run.mesh.data, what + name, held(name))
        if spec.copies is not None and spec.copies.size > 1:
            yield Copy(spec.copies, what + name, held(name))
        elif spec.sum_over is None:
            for box, axis in spec.partial():
                yield Copy(axis, f"{what}{name}{_place(box)}", box.of_local(held(name)))


def _in_shape(master: MasterWeights, tensors: Sequence[Tensor]) -> Callable[[str], Tensor]:
    """Tensors that lie beside the shards, by parameter and in its shape; zero what another rank of data holds."""
    parts = master.by_name(tensors)

    def held(name: str) -> Tensor:
        found = parts.get(name, [])
        whole = tensors[0].new_zeros(master.shapes[name])
        for start, part in found:
            whole.view(-1)[start : start + part.numel()] = part
        return whole

    return held


def _differences(copies: Iterable[Copy]) -> list[str]:
    """Which tensors are not the same on all ranks of their axis; its ranks must all ask for the same tensors."""
    asked: dict[str, tuple[Axis, list[str], list[Tensor]]] = {}
    for axis, name, tensor in copies:
        if axis.size > 1:
            _, names, hashes = asked.setdefault(axis.name, (axis, [], []))
            names.append(name)
            hashes.append(_hash(tensor))
    found: list[str] = []
    for _, (axis, names, hashes) in sorted(asked.items(), key=lambda item: item[0]):
        table = collectives.all_gather(torch.stack(hashes)[None], axis).tolist()  # [ranks, tensors]
        for name, values in zip(names, zip(*table, strict=True), strict=True):
            alike, others = [], []
            for rank, value in zip(_members(axis), values, strict=True):
                (alike if value == values[0] else others).append(rank)
            if others:
                found.append(f"{name} on {ranks_in_words(others)} is not what it is on {ranks_in_words(alike)}")
    return found


def _raise_everywhere(found: Sequence[str], world: Axis, *, first: Sequence[str] = ()) -> None:
    """The same SanityError on all ranks if any of them found something; all must call.

    It tells what comes `first` on any rank before what follows from that.
    """
    ranks = collectives.gather_objects((list(first), list(found)), world)
    texts = list(dict.fromkeys(text for part in (0, 1) for own in ranks for text in own[part]))
    if texts:
        more = f"; and {len(texts) - 1} more like it" if len(texts) > 1 else ""
        raise SanityError(f"sanity check: {texts[0]}{more}")


def _hash(x: Tensor) -> Tensor:
    """A hash of a tensor's bits and their places, 0-d int64; it does not wait for the host."""
    values = x.contiguous().flatten().view(INTEGERS[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, values.numel(), CHUNK):
        part = values[start : start + CHUNK].long()
        total += bits(torch.arange(start, start + part.numel(), device=x.device), part).sum()
    return total


def _members(axis: Axis) -> list[int]:
    """The ranks of the world that stand on an axis, in its order; none for an axis of size 1."""
    return dist.get_process_group_ranks(axis.group) if axis.group is not None else []


def _place(box: Box) -> str:
    return f"[{box.global_start[0]}:{box.global_start[0] + box.shape[0]}]"


def _here(run: Run) -> str:
    mesh = run.mesh
    places = ", ".join(f"{axis.name} rank {axis.rank}" for axis in (mesh.pp, mesh.dp, mesh.tp))
    return f"rank {mesh.world.rank} ({places})"
