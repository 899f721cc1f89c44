"""Another library's names of weights, and how its tensors make up ours, by a model's table. No disk access here."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from pentode.checkpoint.stored import Stored, StoredTensor
from pentode.errors import CheckpointError
from pentode.nn.names import NameTable
from pentode.parallel.shards import Block
from pentode.parallel.spec import ParamSpec


class Theirs(NamedTuple):
    """One of their tensors: a block of one of ours, transposed or not."""

    name: str
    ours: str
    block: Block
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that it has there."""
        return self.block.shape[::-1] if self.transposed else self.block.shape


def our_tensors(
    names: NameTable, theirs: Mapping[str, StoredTensor], *, tied: bool, where: str
) -> dict[str, StoredTensor]:
    """Our tensors, made up of theirs: of a whole model or its bare trunk; some files of tied models repeat the head.

    where   for messages: whose they are

    Raises CheckpointError for a tensor that no rule reads, and for parts that do not fit together.
    """
    unread = {_full_name(name, names): tensor for name, tensor in theirs.items()}
    unread = {name: tensor for name, tensor in unread.items() if not _ignored(name, names)}
    head, embedding = names.tied
    again = unread.pop(head, None) if tied else None
    if again is not None and embedding not in unread:
        unread[embedding] = again
    ours: dict[str, StoredTensor] = {}
    for rule in names.rules:
        for numbers in _numbers(rule.theirs[0], unread):
            wanted = [pattern.format(*numbers) for pattern in rule.theirs]
            missing = [name for name in wanted if name not in unread]
            if missing:
                raise CheckpointError(f"{where}: {missing[0]} is not there, but {wanted[0]} is")
            parts = [unread.pop(name) for name in wanted]
            joined = _joined(parts, transposed=rule.transposed)
            if joined is None:
                shapes = ", ".join(str(list(part.global_shape)) for part in parts)
                raise CheckpointError(f"{where}: {', '.join(wanted)} are {shapes}, which fit no layer")
            if again is not None and wanted == [embedding] and again is not parts[0]:
                joined = _with_copy(joined, again, where=where, names=names)
            ours[rule.ours.format(*numbers)] = joined
    if unread:
        raise CheckpointError(f"{where}: {min(unread)} has no place in this model ({len(unread)} such)")
    return ours


def their_tensors(names: NameTable, specs: Mapping[str, ParamSpec]) -> Iterator[Theirs]:
    """What their files hold of a model with these parameters, in the table's order; fused ones in their pieces."""
    unwritten = dict(specs)
    for rule in names.rules:
        for numbers in _numbers(rule.ours, unwritten):
            ours = rule.ours.format(*numbers)
            spec = unwritten.pop(ours)
            pieces = spec.cut.pieces if len(rule.theirs) > 1 and spec.cut is not None else spec.global_shape[:1]
            at = 0
            for pattern, rows in zip(rule.theirs, pieces, strict=True):
                block = Block((at,) + (0,) * len(spec.global_shape[1:]), (rows, *spec.global_shape[1:]))
                yield Theirs(pattern.format(*numbers), ours, block, rule.transposed)
                at += rows
    if unwritten:
        raise CheckpointError(f"Hugging Face has no name for {min(unwritten)} ({len(unwritten)} such)")


def _joined(parts: Sequence[StoredTensor], *, transposed: bool) -> StoredTensor | None:
    """Tensors joined along our dim 0; None where they do not fit together."""
    turn = -1 if transposed else 1
    shapes = [part.global_shape[::turn] for part in parts]
    if not all(shape and shape[1:] == shapes[0][1:] for shape in shapes):
        return None
    boxes, at = [], 0
    for part, shape in zip(parts, shapes, strict=True):
        for box in part.boxes:
            first, *rest = box.block.start[::turn]
            block = Block((at + first, *rest), box.block.shape[::turn])
            boxes.append(Stored(block, box.tensor, box.start[::turn], transposed))
        at += shape[0]
    return StoredTensor((at, *shapes[0][1:]), boxes)


def _with_copy(tensor: StoredTensor, copy: StoredTensor, *, where: str, names: NameTable) -> StoredTensor:
    """The embedding of a tied model of which the files hold the output layer too."""
    if copy.global_shape != tensor.global_shape:
        raise CheckpointError(
            f"{where}: {names.tied[0]} differs from {names.tied[1]}; tie_word_embeddings should be false"
        )
    return StoredTensor(tensor.global_shape, tensor.boxes, copy.boxes)


def _full_name(name: str, names: NameTable) -> str:
    """The name in a whole model's file, from either kind of file."""
    return name if name.startswith(names.prefix) or name == names.tied[0] else names.prefix + name


def _ignored(name: str, names: NameTable) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in names.ignored)


def _numbers(pattern: str, tensors: Collection[str]) -> Iterator[tuple[str, ...]]:
    """What stands for `{}` in each name that fits the pattern."""
    regex = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
    matches = [regex.fullmatch(name) for name in tensors]
    return iter([match.groups() for match in matches if match])
