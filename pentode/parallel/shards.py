"""Which boxes of global tensors lie in an arbitrary run of this rank's elements, as a shard of a flat buffer is one.

No communication: resharding a checkpoint from any layout to any other is arithmetic on these boxes.
"""

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from torch import Tensor

from pentode.parallel.spec import ParamSpec

Piece = tuple[tuple[int, ...], Tensor]  # where a box starts in the global tensor, and a view of it in the box's shape


class Block(NamedTuple):
    """Elements of a tensor: where they start along each dim, and how far they go."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def overlap(self, other: "Block") -> "Block | None":
        """What both hold; None if that is nothing."""
        start = tuple(map(max, self.start, other.start))
        shape = tuple(min(mine, theirs) - at for mine, theirs, at in zip(self.end, other.end, start, strict=True))
        return Block(start, shape) if all(size > 0 for size in shape) else None

    @property
    def end(self) -> tuple[int, ...]:
        """The first index along each dim that is no longer in it."""
        return tuple(at + size for at, size in zip(self.start, self.shape, strict=True))

    def view(self, x: Tensor, *, start: tuple[int, ...]) -> Tensor:
        """This block of the tensor of which x holds the part that begins at `start`."""
        for dim, (at, first, size) in enumerate(zip(self.start, start, self.shape, strict=True)):
            x = x.narrow(dim, at - first, size)
        return x


def pieces_of_range(spec: ParamSpec, flat: Tensor, start: int, *, owned: bool) -> list[Piece]:
    """The boxes of the global tensor that `flat` holds: elements [start, start + len) of this rank's tensor, flattened.

    Each box is a view of `flat`. Padding of the vocabulary is in none. With `owned`, only what this rank owns.
    """
    held = [(box, Block(box.local_start, box.shape)) for box in (spec.owned() if owned else spec.boxes())]
    found: list[Piece] = []
    at = 0
    for block in blocks_of_range(spec.local_shape, start, stop=start + flat.numel()):
        size = prod(block.shape)
        values = flat[at : at + size].view(block.shape)
        at += size
        for box, local in held:
            shared = block.overlap(local)
            if shared is not None:
                moves = zip(shared.start, box.local_start, box.global_start, strict=True)
                global_start = tuple(mine - first + first_global for mine, first, first_global in moves)
                found.append((global_start, shared.view(values, start=block.start)))
    return found


def blocks_of_range(shape: tuple[int, ...], start: int, *, stop: int) -> list[Block]:
    """The blocks that elements [start, stop) of a row-major tensor make up, in order: at most 2 * dims - 1.

    Those are the end of a row, whole rows and the beginning of a row, and each of the partial rows likewise.
    """
    if start >= stop:
        return []
    if not shape:
        return [Block((), ())]
    row = prod(shape[1:])
    (first, skipped), (last, rest) = divmod(start, row), divmod(stop, row)
    if first == last:
        return _in_row(first, shape, skipped, rest)
    found = []
    if skipped > 0:
        found += _in_row(first, shape, skipped, row)
        first += 1
    if first < last:
        found.append(Block((first,) + (0,) * len(shape[1:]), (last - first, *shape[1:])))
    return found + _in_row(last, shape, 0, rest)


def disjoint(blocks: Iterable[Block]) -> bool:
    """Whether no element is in two of the blocks."""
    near: list[Block] = []  # those before, without the ones that end before this one and all later ones start
    for block in sorted(blocks):
        near = [other for other in near if other.end[:1] > block.start[:1] or not block.start]
        if any(block.overlap(other) for other in near):
            return False
        near.append(block)
    return True


def _in_row(number: int, shape: tuple[int, ...], start: int, stop: int) -> list[Block]:
    """The blocks of elements [start, stop) of one row."""
    inside = blocks_of_range(shape[1:], start, stop=stop)
    return [Block((number, *block.start), (1, *block.shape)) for block in inside]
