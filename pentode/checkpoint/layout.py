"""The tensor files of a checkpoint: their entries and headers. No disk access here.

docs/formats.md describes the same, for a reader in another language.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import add

import torch
from torch import Tensor

from pentode.checkpoint.manifest import FORMAT, FORMAT_VERSION, header_table, is_count
from pentode.dist.mesh import Axis
from pentode.parallel.shards import Block, Piece, blocks_of_range
from pentode.parallel.spec import Box

ALIGNMENT = 8  # a tensor file's header is padded to a multiple of this
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Saved:
    """What this rank writes or fills of a global tensor: disjoint boxes of it, each a view; there may be none.

    What this rank does not write, others do; each element belongs to one box of one rank.
    """

    global_shape: tuple[int, ...]
    pieces: Sequence[Piece]

    @classmethod
    def whole(cls, tensor: Tensor) -> "Saved":
        """A tensor that this rank holds whole, without padding."""
        return cls(tuple(tensor.shape), [((0,) * tensor.dim(), tensor)])

    @classmethod
    def of(cls, tensor: Tensor, global_shape: tuple[int, ...], boxes: Sequence[Box]) -> "Saved":
        """The boxes of a local tensor; what lies outside them (padding of the vocabulary) is neither saved nor read."""
        return cls(global_shape, [(box.global_start, box.of_local(tensor)) for box in boxes])

    @property
    def nbytes(self) -> int:
        """Bytes that the pieces take in a file."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.pieces)


def share_of(group: Mapping[str, Saved], axis: Axis) -> dict[str, Saved]:
    """This rank's part of what all ranks of `axis` hold alike: their bytes, side by side, cut evenly at elements."""
    total, at = sum(saved.nbytes for saved in group.values()), 0
    edges = [total * rank // axis.size for rank in (axis.rank, axis.rank + 1)]
    found = {}
    for name, saved in group.items():
        pieces: list[Piece] = []
        for start, tensor in saved.pieces:
            width, count, origin = tensor.element_size(), tensor.numel(), (0,) * tensor.dim()
            begin, end = (min(max(-((at - edge) // width), 0), count) for edge in edges)  # rounded up
            for block in blocks_of_range(tuple(tensor.shape), begin, stop=end):
                pieces.append((tuple(map(add, start, block.start)), block.view(tensor, start=origin)))
            at += count * width
        found[name] = Saved(saved.global_shape, pieces)
    return found


@dataclass(frozen=True)
class Entry:
    """One box of a global tensor in a tensor file: its bytes are file[begin:end] after the header."""

    name: str
    global_shape: tuple[int, ...]
    block: Block
    dtype: torch.dtype
    begin: int
    end: int

    @property
    def key(self) -> str:
        """Its name in the file: the tensor's own if it is whole, else `name@start,start`."""
        if self.block.shape == self.global_shape:
            return self.name
        return f"{self.name}@{','.join(map(str, self.block.start))}"


def entries(group: Mapping[str, Saved]) -> Iterator[tuple[Entry, Tensor]]:
    """Each box to write and the view that holds it, in file order: wide dtypes first (all aligned), then by name."""
    pieces = [(name, saved.global_shape, *piece) for name, saved in group.items() for piece in saved.pieces]
    begin = 0
    for name, global_shape, start, tensor in sorted(pieces, key=lambda piece: (-piece[3].element_size(), piece[0])):
        end = begin + tensor.numel() * tensor.element_size()
        yield Entry(name, global_shape, Block(start, tuple(tensor.shape)), tensor.dtype, begin, end), tensor
        begin = end


def header(found: Sequence[Entry], *, metadata: Mapping[str, str] | None = None) -> bytes:
    """The length and the JSON header that begin a safetensors file: a checkpoint's, or with other `metadata`."""
    cut = {entry.name: list(entry.global_shape) for entry in found if entry.key != entry.name}
    ours = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "global_shapes": json.dumps(cut)}
    table: dict[str, object] = {"__metadata__": ours if metadata is None else metadata}
    for entry in found:
        table[entry.key] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.block.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def parse_header(text: bytes, *, data_size: int) -> list[Entry]:
    """The entries of a JSON header whose data is `data_size` bytes long; ValueError unless they cover it exactly."""
    table, global_shapes = header_table(text)
    found = sorted((_entry(key, what, global_shapes) for key, what in table.items()), key=lambda e: (e.begin, e.end))
    at = 0
    for entry in found:
        if entry.begin != at:
            raise ValueError(f"{entry.key} does not begin where the tensor before it ends")
        at = entry.end
    if at != data_size:
        raise ValueError(f"its tensors take {at} bytes, its data {data_size}")
    return found


def _entry(key: str, what: object, global_shapes: Mapping[str, object]) -> Entry:
    if (
        not isinstance(what, dict)
        or set(what) != {"dtype", "shape", "data_offsets"}
        or str(what["dtype"]) not in DTYPES
    ):
        raise ValueError(f"{key} is described by {str(what)[:80]}")
    shape, offsets, dtype = _counts(key, what["shape"]), _counts(key, what["data_offsets"]), DTYPES[what["dtype"]]
    name, at, place = key.partition("@")
    start = tuple(int(number) for number in place.split(",")) if at else (0,) * len(shape)
    global_shape = _counts(key, global_shapes.get(name)) if at else shape
    inside = len(start) == len(shape) == len(global_shape) and all(
        begin >= 0 and begin + size <= whole for begin, size, whole in zip(start, shape, global_shape, strict=True)
    )
    if not inside or len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * dtype.itemsize:
        raise ValueError(f"{key}: its shape {list(shape)}, place or bytes {list(offsets)} contradict each other")
    return Entry(name, global_shape, Block(start, shape), dtype, *offsets)


def _counts(key: str, found: object) -> tuple[int, ...]:
    if not isinstance(found, list) or not all(is_count(number) for number in found):
        raise ValueError(f"{key}: {str(found)[:80]} is not a list of sizes")
    return tuple(found)
