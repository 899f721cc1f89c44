"""A reader of checkpoints written from docs/formats.md alone: Python's own library, no torch, nothing of pentode.

Whoever writes one in another language finds here what it has to do, in the order in which it does it:

    1. `newest(run)`: the folders that are named by a number, the highest first, until one is whole.
    2. `Checkpoint(folder)`: the manifest, its digest, and each file's size and checksum.
    3. `tensors(group)`: the boxes of all files of a group, put together to whole tensors.
    4. `numbers(tensor)`: bytes as Python's numbers.

usage: python tests/helpers/plain_reader.py FOLDER     prints what a run's newest checkpoint, or one checkpoint, holds
"""

import hashlib
import json
import math
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}  # bytes of an element
STRUCT = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "U8": "B", "BOOL": "?"}
FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,120}", re.ASCII)
TENSOR_FILE = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)
MANIFEST_LIMIT, HEADER_LIMIT = 64 * 2**20, 100 * 2**20  # bytes


class Damaged(Exception):
    """A checkpoint that is not what was saved."""


@dataclass
class Tensor:
    """A whole tensor: its elements row-major and little-endian, as in the files."""

    dtype: str
    shape: tuple[int, ...]
    data: bytearray


@dataclass
class Box:
    """A part of a tensor, or all of it: where it begins in the tensor, its shape, and its bytes."""

    name: str
    global_shape: tuple[int, ...]
    dtype: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    data: bytes


class Checkpoint:
    """A checkpoint whose every file has the size and checksum that its manifest tells; else Damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "manifest.json").is_file() or (folder / "manifest.json").stat().st_size > MANIFEST_LIMIT:
            raise Damaged(f"{folder}: no manifest.json")
        manifest = _object((folder / "manifest.json").read_bytes())
        if manifest.get("format") != "pentode-checkpoint" or manifest.get("format_version") != 1:
            raise Damaged(f"{folder}: another format, or a newer one")
        self.step: int = manifest["step"]
        self.files: dict[str, Any] = manifest["files"]
        if folder.name.isdigit() and int(folder.name) != self.step:
            raise Damaged(f"{folder}: the checkpoint of step {self.step}")
        lines = [f"pentode-checkpoint 1 {self.step}"]
        lines += [f"{name} {facts['size']} {facts['sha256']}" for name, facts in sorted(self.files.items())]
        if hashlib.sha256("\n".join(lines).encode()).hexdigest() != manifest["digest"]:
            raise Damaged(f"{folder}: the manifest was changed")
        for name, facts in self.files.items():
            path = folder / name
            if not FILE_NAME.fullmatch(name) or path.is_symlink() or not path.is_file():
                raise Damaged(f"{path}: not a file of its own")
            data = path.read_bytes()
            if len(data) != facts["size"] or hashlib.sha256(data).hexdigest() != facts["sha256"]:
                raise Damaged(f"{path}: not what was saved")
        self.state = _object((folder / "state.json").read_bytes())

    def groups(self) -> list[str]:
        """The groups of tensors that it has: weights and, unless it came from elsewhere, optimizer."""
        return sorted({found[1] for found in map(TENSOR_FILE.fullmatch, self.files) if found})

    def tensors(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group by name, each put together from its boxes."""
        names = sorted(name for name in self.files if (found := TENSOR_FILE.fullmatch(name)) and found[1] == group)
        count = len(names)
        if names != [f"{group}-{number:05}-of-{count:05}.safetensors" for number in range(count)]:
            raise Damaged(f"{self.folder}: files of {group} are missing")
        found: dict[str, Tensor] = {}
        left: dict[str, int] = {}
        for box in (box for name in names for box in boxes(self.folder / name)):
            if box.name not in found:
                size = math.prod(box.global_shape)
                found[box.name] = Tensor(box.dtype, box.global_shape, bytearray(size * SIZES[box.dtype]))
                left[box.name] = size
            put(box, found[box.name])
            left[box.name] -= math.prod(box.shape)
        if any(left.values()):
            raise Damaged(f"{self.folder}: {', '.join(name for name in left if left[name])} not whole")
        return found


def newest(run: Path) -> Checkpoint:
    """The checkpoint of the highest step in a run's folder that is whole."""
    steps = sorted(
        (int(path.name) for path in run.iterdir() if re.fullmatch(r"0|[1-9]\d{0,11}", path.name)), reverse=True
    )
    for step in steps:
        try:
            return Checkpoint(run / str(step))
        except Damaged as error:
            print(f"{error}; an older one is looked for", file=sys.stderr)
    raise Damaged(f"{run}: no checkpoint is whole")


def boxes(path: Path) -> Iterator[Box]:
    """The boxes of one file of tensors."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(len(data) - 8, HEADER_LIMIT):
        raise Damaged(f"{path}: its header claims {length} bytes")
    header, body = _object(data[8 : 8 + length]), data[8 + length :]
    global_shapes = _object(header.pop("__metadata__")["global_shapes"].encode())
    for key, what in header.items():
        name, cut, place = key.partition("@")
        shape = tuple(what["shape"])
        start = tuple(map(int, place.split(","))) if cut else (0,) * len(shape)
        global_shape = tuple(global_shapes[name]) if cut else shape
        begin, end = what["data_offsets"]
        if end - begin != math.prod(shape) * SIZES[what["dtype"]] or end > len(body):
            raise Damaged(f"{path}: {key} has not the bytes of its shape")
        yield Box(name, global_shape, what["dtype"], start, shape, body[begin:end])


def put(box: Box, tensor: Tensor) -> None:
    """Copy a box to its place in the whole tensor, a row of its last dimension at a time."""
    size = SIZES[box.dtype]
    if not box.shape:
        tensor.data[:] = box.data
        return
    *outer, width = box.shape
    strides = [math.prod(box.global_shape[dim + 1 :]) for dim in range(len(box.shape))]  # elements between neighbours
    for number, index in enumerate(product(*map(range, outer))):
        place = [first + at for first, at in zip(box.start, (*index, 0), strict=True)]
        at = sum(stride * where for stride, where in zip(strides, place, strict=True)) * size
        tensor.data[at : at + width * size] = box.data[number * width * size : (number + 1) * width * size]


def numbers(tensor: Tensor) -> list[float]:
    """The elements in row-major order. BF16 is the upper half of F32."""
    count, data = math.prod(tensor.shape), bytes(tensor.data)
    if tensor.dtype == "BF16":
        data = b"".join(b"\0\0" + data[at : at + 2] for at in range(0, len(data), 2))
    return list(struct.unpack(f"<{count}{STRUCT.get(tensor.dtype, 'f')}", data))


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a torn last line is passed over."""
    rows = []
    for line in (run / "metrics.jsonl").read_bytes().split(b"\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _object(data: bytes) -> dict[str, Any]:
    """Strict JSON: an object without NaN or repeated keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise Damaged("a key twice")
        return dict(pairs)

    def refused(name: str) -> None:
        raise Damaged(f"{name} in JSON")

    try:
        found = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refused)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"no JSON: {error}") from error
    if not isinstance(found, dict):
        raise Damaged("no JSON object")
    return found


def main() -> None:
    """Print what a checkpoint holds: its counts, and of each tensor dtype, shape, and mean of its elements."""
    folder = Path(sys.argv[1])
    checkpoint = Checkpoint(folder) if (folder / "manifest.json").exists() else newest(folder)
    print(f"step {checkpoint.step}: {json.dumps(checkpoint.state)}")
    for group in checkpoint.groups():
        for name, tensor in sorted(checkpoint.tensors(group).items()):
            found = numbers(tensor)
            print(f"{group} {name} {tensor.dtype} {list(tensor.shape)} mean {sum(found) / max(1, len(found)):.6g}")


if __name__ == "__main__":
    main()
