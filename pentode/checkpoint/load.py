"""Loading: read boxes of a checkpoint's tensors into tensors here, whatever layout wrote them."""

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pentode.checkpoint.folder import Checkpoint, DamagedError, reason
from pentode.checkpoint.layout import Entry, Saved, parse_header
from pentode.errors import CheckpointError
from pentode.parallel.shards import Block, disjoint


@dataclass(frozen=True)
class _Stored:
    """A box of a global tensor in a file, its bytes from `offset` on."""

    path: Path
    offset: int
    entry: Entry

    def rows_of(self, part: Block) -> tuple[Tensor, tuple[int, ...]]:
        """Those rows of the box that `part` of it lies in, whole and no others, and where they start."""
        start, shape = self.entry.block
        rows = Block(part.start[:1] + start[1:], part.shape[:1] + shape[1:])
        skipped = (part.start[0] - start[0]) * prod(shape[1:]) if shape else 0
        width = self.entry.dtype.itemsize
        data = np.fromfile(
            self.path, dtype=np.uint8, count=prod(rows.shape) * width, offset=self.offset + skipped * width
        )
        return torch.from_numpy(data).view(self.entry.dtype).reshape(rows.shape), rows.start


@torch.no_grad()
def read_tensors(
    checkpoint: Checkpoint,
    group: str,
    into: Mapping[str, Saved],
    *,
    names: Collection[str] | None = None,
    rounded: bool = False,
) -> None:
    """Fill tensors, by name, with a group's, whatever boxes the ranks that wrote it had.

    names    of the whole model over all ranks, `into` being a part of them; without it, `into` has them all
    rounded  a tensor may be narrower than the file's, whose values are then rounded

    Names must be the same there and here, and so must each global shape. A dtype may differ where the tensor's own
    holds every value of the file's, or with `rounded`. No more than one tensor is held beside those that are filled.
    """
    there = _stored(checkpoint, group)
    _compare(checkpoint, group, there, into, names=into.keys() | set(names or ()), rounded=rounded)
    for name, saved in into.items():
        for start, tensor in saved.pieces:
            filled = [block for stored in there[name] if (block := _fill(tensor, start, stored=stored))]
            if sum(prod(block.shape) for block in filled) != tensor.numel() or not disjoint(filled):
                raise DamagedError(f"{checkpoint}: {name} is not whole, or parts of it are there twice")


def global_shapes(checkpoint: Checkpoint, group: str) -> dict[str, tuple[int, ...]]:
    """The global shape of each tensor of a group, by its name."""
    return {name: boxes[0].entry.global_shape for name, boxes in _stored(checkpoint, group).items()}


def _stored(checkpoint: Checkpoint, group: str) -> dict[str, list[_Stored]]:
    """Where a group's files have the boxes of each tensor, by its name."""
    there: dict[str, list[_Stored]] = {}
    for file in checkpoint.files_of(group):
        begin, found = _entries_of(checkpoint, file)
        for entry in found:
            there.setdefault(entry.name, []).append(_Stored(checkpoint.folder / file, begin + entry.begin, entry))
    return there


def _entries_of(checkpoint: Checkpoint, name: str) -> tuple[int, list[Entry]]:
    """Where a tensor file's data begins, and what it holds."""
    begin, text = checkpoint.header(name)
    try:
        return begin, parse_header(text, data_size=checkpoint.manifest.files[name].size - begin)
    except ValueError as error:
        raise DamagedError(f"{checkpoint}: {name}: {reason(error)}") from error


def _compare(
    checkpoint: Checkpoint,
    group: str,
    there: Mapping[str, list[_Stored]],
    here: Mapping[str, Saved],
    *,
    names: Set[str],
    rounded: bool,
) -> None:
    differ = f"the two {'models' if group == 'weights' else 'optimizers'} differ"
    for name in sorted(names - there.keys()):
        raise CheckpointError(f"{checkpoint}: {name} is not in its {group}; {differ}")
    for name in sorted(there.keys() - names):
        raise CheckpointError(f"{checkpoint}: {name} is in its {group}, but not in this model; {differ}")
    for name, saved in here.items():
        for shape in {stored.entry.global_shape for stored in there[name]} - {tuple(saved.global_shape)}:
            raise CheckpointError(
                f"{checkpoint}: {name} is {list(shape)} there, {list(saved.global_shape)} here; {differ}"
            )
        dtypes = {stored.entry.dtype for stored in there[name]}, {tensor.dtype for _, tensor in saved.pieces}
        for theirs, ours in product(*dtypes):
            if torch.promote_types(theirs, ours) != ours and not rounded:
                raise CheckpointError(
                    f"{checkpoint}: {name} is {_name(theirs)} there, {_name(ours)} here, which cannot hold it; "
                    "set model.dtype as it was"
                )


def _fill(tensor: Tensor, start: tuple[int, ...], *, stored: _Stored) -> Block | None:
    """Copy what a stored box shares with the box that begins at `start` into its tensor; what that was."""
    shared = stored.entry.block.overlap(Block(start, tuple(tensor.shape)))
    if shared is not None:
        rows, first = stored.rows_of(shared)
        shared.view(tensor, start=start).copy_(shared.view(rows, start=first))
    return shared


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
