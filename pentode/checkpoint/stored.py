"""Tensors that lie in files, whole or in boxes, whoever wrote them, and how any part of one is read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pentode.checkpoint.folder import reason
from pentode.checkpoint.layout import Saved
from pentode.errors import CheckpointError
from pentode.parallel.shards import Block, disjoint
from pentode.parallel.spec import ParamSpec

AT_ONCE = 32 * 2**20  # bytes read before they are copied to where they belong; a single row may take more


@dataclass(frozen=True)
class InFile:
    """A row-major tensor in a file, its bytes from `offset` on."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the file."""
        return prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, count: int) -> Tensor:
        """So many whole rows from `first` on; of a tensor without dimensions its one element."""
        shape = (count, *self.shape[1:]) if self.shape else ()
        width = prod(self.shape[1:]) * self.dtype.itemsize
        try:
            data = np.fromfile(self.path, dtype=np.uint8, count=count * width, offset=self.offset + first * width)
            if data.size < count * width:
                raise ValueError("it is shorter than it was")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot be read ({reason(error)})") from error
        return torch.from_numpy(data).view(self.dtype).reshape(shape)


@dataclass(frozen=True)
class Stored:
    """A box of a global tensor, which a file holds.

    block       which box
    tensor      in which of a file's tensors it lies
    start       where it begins in that, counted in our dimensions
    transposed  that tensor is [in, out] where ours is [out, in]
    """

    block: Block
    tensor: InFile
    start: tuple[int, ...]
    transposed: bool = False

    def copy_to(self, target: Tensor, at: tuple[int, ...]) -> Block | None:
        """Copy what this box shares with the box of the global tensor that `target` is, from `at` on; what that was."""
        shared = self.block.overlap(Block(at, tuple(target.shape)))
        if shared is None:
            return None
        into = shared.view(target, start=at)
        start = tuple(
            mine + first - whole for mine, first, whole in zip(shared.start, self.start, self.block.start, strict=True)
        )
        if self.transposed:
            start, into = start[::-1], into.T
        for first, part in _row_parts(into, row_bytes=prod(self.tensor.shape[1:]) * self.tensor.dtype.itemsize):
            begin = (start[0] + first, *start[1:]) if start else ()
            rows = self.tensor.rows(begin[0] if begin else 0, part.shape[0] if begin else 1)
            part.copy_(Block(begin, tuple(part.shape)).view(rows, start=begin[:1] + (0,) * len(begin[1:])))
        return shared


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor in files.

    boxes  cover it exactly once
    again  further boxes, which must hold the same: some files of tied models repeat the embedding as output layer
    """

    global_shape: tuple[int, ...]
    boxes: Sequence[Stored]
    again: Sequence[Stored] = ()

    @classmethod
    def of(cls, tensor: InFile) -> "StoredTensor":
        """One that a file holds whole."""
        origin = (0,) * len(tensor.shape)
        return cls(tensor.shape, [Stored(Block(origin, tensor.shape), tensor, origin)])

    @property
    def dtype(self) -> torch.dtype:
        """One that holds all of its values."""
        found = self.boxes[0].tensor.dtype
        for box in self.boxes[1:]:
            found = torch.promote_types(found, box.tensor.dtype)
        return found


@dataclass(frozen=True)
class Weights:
    """A model's weights in files, by our names.

    where    the folder, for messages
    said_by  the file in it that says which weights there should be
    """

    where: str
    said_by: str
    tensors: Mapping[str, StoredTensor]

    def compare(self, specs: Mapping[str, ParamSpec]) -> None:
        """Refuse weights that are not those of a model with these parameters."""
        for name in sorted(specs.keys() ^ self.tensors.keys()):
            where = "is not there" if name in specs else "is there"
            raise CheckpointError(f"{self.where}: {name} {where}, against what {self.said_by} says")
        for name, spec in specs.items():
            found = self.tensors[name].global_shape
            if found != spec.global_shape:
                raise CheckpointError(
                    f"{self.where}: {name} is {list(found)}, by {self.said_by} {list(spec.global_shape)}"
                )

    @torch.no_grad()
    def read(self, name: str, into: Saved, *, rounded: bool = False) -> None:
        """Fill the boxes of `into` with a tensor's, reading no others; only `rounded` may lose digits.

        Raises CheckpointError where the files do not hold each element once, or hold two values of it.
        """
        found = self.tensors[name]
        for start, target in into.pieces:
            if not rounded and torch.promote_types(found.dtype, target.dtype) != target.dtype:
                raise CheckpointError(
                    f"{self.where}: {name} is {_word(found.dtype)} there, {_word(target.dtype)} here, which cannot "
                    "hold it; set model.dtype as it was"
                )
            if not fill(target, start, found.boxes):
                raise CheckpointError(f"{self.where}: {name} is not whole, or parts of it are there twice")
            if found.again:
                other = torch.empty_like(target)
                if not fill(other, start, found.again) or not torch.equal(target, other):
                    raise CheckpointError(
                        f"{self.where}: {name} differs from the output layer that is there too; "
                        "tie_word_embeddings should be false"
                    )

    def whole(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor in memory, as it is in the files or rounded to `dtype`."""
        found = self.tensors[name]
        tensor = torch.empty(found.global_shape, dtype=dtype or found.dtype)
        self.read(name, Saved.whole(tensor), rounded=True)
        return tensor


def fill(target: Tensor, start: tuple[int, ...], boxes: Sequence[Stored]) -> bool:
    """Fill the box of a global tensor that begins at `start`; whether `boxes` held each of its elements once."""
    filled = [block for box in boxes if (block := box.copy_to(target, start)) is not None]
    return sum(prod(block.shape) for block in filled) == target.numel() and disjoint(filled)


def _row_parts(into: Tensor, *, row_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """A tensor in parts of a few rows, each with the number of its first row."""
    if not into.dim():
        yield 0, into
        return
    rows = max(1, AT_ONCE // max(row_bytes, 1))
    for first in range(0, into.shape[0], rows):
        yield first, into[first : first + rows]


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
