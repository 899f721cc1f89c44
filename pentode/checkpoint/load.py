"""Loading: read boxes of a checkpoint's tensors into tensors here, whatever layout wrote them."""

from collections.abc import Collection, Mapping, Set
from itertools import product

import torch

from pentode.checkpoint.folder import Checkpoint, DamagedError, reason
from pentode.checkpoint.layout import Entry, Saved, parse_header
from pentode.checkpoint.stored import InFile, Stored, StoredTensor, Weights, fill
from pentode.errors import CheckpointError

MASTER = "master/"  # what the names of master weights begin with in the optimizer's group
_Boxes = dict[str, list[tuple[Entry, Stored]]]  # of each tensor of a group, by its name


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
    there = _boxes(checkpoint, group)
    _compare(checkpoint, group, there, into, names=into.keys() | set(names or ()), rounded=rounded)
    for name, saved in into.items():
        boxes = [stored for _, stored in there[name]]
        for start, tensor in saved.pieces:
            if not fill(tensor, start, boxes):
                raise DamagedError(f"{checkpoint}: {name} is not whole, or parts of it are there twice")


def global_shapes(checkpoint: Checkpoint, group: str) -> dict[str, tuple[int, ...]]:
    """The global shape of each tensor of a group, by its name."""
    return {name: boxes[0][0].global_shape for name, boxes in _boxes(checkpoint, group).items()}


def weights_of(checkpoint: Checkpoint, *, masters: bool) -> Weights:
    """A checkpoint's weights as the model held them, or the masters that they were rounded from where it has such."""
    wide: _Boxes = {}
    if masters and "optimizer" in checkpoint.groups():
        optimizer = _boxes(checkpoint, "optimizer")
        wide = {name.removeprefix(MASTER): boxes for name, boxes in optimizer.items() if name.startswith(MASTER)}
    found = {}
    for name, boxes in (_boxes(checkpoint, "weights") | wide).items():
        shapes = {entry.global_shape for entry, _ in boxes}
        if len(shapes) > 1:
            raise DamagedError(f"{checkpoint}: parts of {name} are of tensors of {' and '.join(map(str, shapes))}")
        found[name] = StoredTensor(shapes.pop(), [stored for _, stored in boxes])
    return Weights(str(checkpoint), "config.yaml", found)


def _boxes(checkpoint: Checkpoint, group: str) -> _Boxes:
    """All that a group's files hold."""
    found: _Boxes = {}
    for file in checkpoint.files_of(group):
        begin, entries = _entries_of(checkpoint, file)
        for entry in entries:
            tensor = InFile(checkpoint.folder / file, begin + entry.begin, entry.dtype, entry.block.shape)
            stored = Stored(entry.block, tensor, (0,) * len(entry.block.shape))
            found.setdefault(entry.name, []).append((entry, stored))
    return found


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
    there: _Boxes,
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
        for shape in {entry.global_shape for entry, _ in there[name]} - {tuple(saved.global_shape)}:
            raise CheckpointError(
                f"{checkpoint}: {name} is {list(shape)} there, {list(saved.global_shape)} here; {differ}"
            )
        dtypes = {entry.dtype for entry, _ in there[name]}, {tensor.dtype for _, tensor in saved.pieces}
        for theirs, ours in product(*dtypes):
            if torch.promote_types(theirs, ours) != ours and not rounded:
                raise CheckpointError(
                    f"{checkpoint}: {name} is {_name(theirs)} there, {_name(ours)} here, which cannot hold it; "
                    "set model.dtype as it was"
                )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
