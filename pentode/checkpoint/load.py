"""Loading: find the newest checkpoint that is whole, prove it against its manifest, and read boxes into tensors.

Nothing is trusted before its checksum is right; names cannot leave the folder; there is no pickle.
"""

import re
import secrets
import stat
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pentode import log
from pentode.checkpoint import storage
from pentode.checkpoint.layout import (
    MANIFEST,
    STATE,
    STEP_NAME,
    Entry,
    Manifest,
    NewerFormatError,
    Saved,
    parse_header,
    parse_json,
)
from pentode.errors import CheckpointError
from pentode.parallel.shards import Block, disjoint

MANIFEST_LIMIT = 64 * 2**20  # bytes
HEADER_LIMIT = 100 * 2**20  # bytes, as in the safetensors library


class DamagedError(CheckpointError):
    """A checkpoint that is not what was saved; an older one may be. `what` is the message without its remedy."""

    def __init__(self, what: str, *, remedy: str = "restore the checkpoint from a copy, or use another") -> None:
        super().__init__(f"{what}; {remedy}")
        self.what = what


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


@dataclass
class Checkpoint:
    """An open checkpoint. Its files are checked when they are first read, or all at once by `verify`."""

    folder: Path
    manifest: Manifest
    state: dict[str, Any] = field(default_factory=dict)
    proven: set[str] = field(default_factory=set)

    @property
    def step(self) -> int:
        """Updates done when it was saved."""
        return self.manifest.step

    def verify(self) -> None:
        """Compare every file with the manifest; raises CheckpointError."""
        for name in self.manifest.files:
            self._prove(name)

    def file(self, name: str) -> bytes:
        """The bytes of one of the small files."""
        self._prove(name)
        return (self.folder / name).read_bytes()

    @torch.no_grad()
    def read(self, group: str, into: Mapping[str, Saved], *, names: Collection[str] | None = None) -> None:
        """Fill tensors, by name, with a group's, whatever boxes the ranks that wrote it had.

        names   of the whole model over all ranks, `into` being a part of them; without it, `into` has them all

        Names must be the same there and here, and so must each global shape. A dtype may differ where the tensor's own
        holds every value of the file's.
        """
        there: dict[str, list[_Stored]] = {}
        for path in self._files_of(group):
            begin, found = self._header(path)
            for entry in found:
                there.setdefault(entry.name, []).append(_Stored(path, begin + entry.begin, entry))
        self._compare(group, there, into, names=into.keys() | set(names or ()))
        for name, saved in into.items():
            for start, tensor in saved.pieces:
                filled = [block for stored in there[name] if (block := _fill(tensor, start, stored=stored))]
                if sum(prod(block.shape) for block in filled) != tensor.numel() or not disjoint(filled):
                    raise DamagedError(f"{self}: {name} is not whole, or parts of it are there twice")

    def __str__(self) -> str:
        return f"checkpoint {self.step} in {self.folder.parent}"

    def _prove(self, name: str) -> None:
        if name in self.proven:
            return
        facts = self.manifest.files.get(name)
        if facts is None:
            raise CheckpointError(f"{self}: it has no {name}")
        path = self.folder / name
        try:
            size = _regular_size(path)
            if size != facts.size:
                raise DamagedError(f"{self}: {name} has {size:,} bytes, not {facts.size:,}")
            if storage.hash_file(path) != facts:
                raise DamagedError(f"{self}: {name} is damaged, its checksum is wrong")
        except (OSError, ValueError) as error:
            raise DamagedError(f"{self}: {name} cannot be read ({_reason(error)})") from error
        self.proven.add(name)

    def _files_of(self, group: str) -> list[Path]:
        """The files of a group, one per rank that wrote; all must be there."""
        pattern = re.compile(re.escape(group) + r"-(\d{5})-of-(\d{5})\.safetensors")
        found = [match for match in map(pattern.fullmatch, sorted(self.manifest.files)) if match]
        if not found:
            raise CheckpointError(f"{self}: it has no {group}")
        world = int(found[0][2])
        if [(int(match[1]), int(match[2])) for match in found] != [(rank, world) for rank in range(world)]:
            raise DamagedError(f"{self}: {group} should be {world} files, one per rank")
        return [self.folder / match[0] for match in found]

    def _header(self, path: Path) -> tuple[int, list[Entry]]:
        """Where a tensor file's data begins, and what it holds."""
        self._prove(path.name)
        size = self.manifest.files[path.name].size
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, HEADER_LIMIT):
                    raise ValueError(f"its header claims {length:,} bytes")
                return 8 + length, parse_header(file.read(length), data_size=size - 8 - length)
        except (OSError, ValueError) as error:
            raise DamagedError(f"{self}: {path.name}: {_reason(error)}") from error

    def _compare(
        self,
        group: str,
        there: Mapping[str, list[_Stored]],
        here: Mapping[str, Saved],
        *,
        names: Set[str],
    ) -> None:
        differ = f"the two {'models' if group == 'weights' else 'optimizers'} differ"
        for name in sorted(names - there.keys()):
            raise CheckpointError(f"{self}: {name} is not in its {group}; {differ}")
        for name in sorted(there.keys() - names):
            raise CheckpointError(f"{self}: {name} is in its {group}, but not in this model; {differ}")
        for name, saved in here.items():
            for shape in {stored.entry.global_shape for stored in there[name]} - {tuple(saved.global_shape)}:
                raise CheckpointError(
                    f"{self}: {name} is {list(shape)} there, {list(saved.global_shape)} here; {differ}"
                )
            dtypes = {stored.entry.dtype for stored in there[name]}, {tensor.dtype for _, tensor in saved.pieces}
            for theirs, ours in product(*dtypes):
                if torch.promote_types(theirs, ours) != ours:
                    raise CheckpointError(
                        f"{self}: {name} is {_name(theirs)} there, {_name(ours)} here, which cannot hold it; "
                        "set model.dtype as it was"
                    )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open one checkpoint by its folder; raises CheckpointError where that is none, or is damaged."""
    path = folder / MANIFEST
    try:
        if _regular_size(path) > MANIFEST_LIMIT:
            raise ValueError(f"it is larger than {MANIFEST_LIMIT:,} bytes")
        manifest = Manifest.parse(path.read_bytes())
        name = folder.resolve().name
        if STEP_NAME.fullmatch(name) and int(name) != manifest.step:
            raise ValueError(f"it is that of step {manifest.step}")
    except FileNotFoundError as error:
        inside = [step.name for step in steps(folder)] if folder.is_dir() else []
        remedy = f"give the folder of a step: {', '.join(inside)}" if inside else "give the folder of a step"
        raise DamagedError(f"{folder}: it has no {MANIFEST}, so it is no checkpoint", remedy=remedy) from error
    except NewerFormatError as error:
        raise CheckpointError(f"{path}: {error}; use the Pentode that wrote it, or a newer one") from error
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path}: {_reason(error)}") from error
    checkpoint = Checkpoint(folder, manifest)
    try:
        checkpoint.state.update(parse_json(checkpoint.file(STATE)))
    except ValueError as error:
        raise DamagedError(f"{folder / STATE}: {_reason(error)}") from error
    return checkpoint


def newest(root: Path, *, quarantine: bool = False) -> Checkpoint | None:
    """The newest checkpoint in a run's folder whose every file is proven right; None if the folder holds none.

    Each damaged one that is newer gets a line in the log and, with `quarantine`, another name (.bad-<step>-...): only
    the process that trains there should ask for that. Damaged ones and no good one is a CheckpointError.
    """
    damaged: list[tuple[Path, DamagedError]] = []
    for folder in steps(root):
        try:
            checkpoint = open_checkpoint(folder)
            checkpoint.verify()
        except DamagedError as error:
            damaged.append((folder, error))
            continue
        for bad, error in damaged:
            log.warning(f"{error.what}; going on from step {checkpoint.step}")
            if quarantine:
                with storage.explained(root):
                    storage.rename(bad, bad.with_name(f".bad-{bad.name}-{secrets.token_hex(4)}"))
        return checkpoint
    if damaged:
        raise CheckpointError(f"{damaged[0][1]}; no older checkpoint in {root} is whole, so nothing was trained")
    return None


def steps(root: Path) -> list[Path]:
    """The folders in `root` that are named as checkpoints are, the newest first."""
    found = [path for path in root.glob("*") if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: -int(path.name))


def _fill(tensor: Tensor, start: tuple[int, ...], *, stored: _Stored) -> Block | None:
    """Copy what a stored box shares with the box that begins at `start` into its tensor; what that was."""
    shared = stored.entry.block.overlap(Block(start, tuple(tensor.shape)))
    if shared is not None:
        rows, first = stored.rows_of(shared)
        shared.view(tensor, start=start).copy_(shared.view(rows, start=first))
    return shared


def _regular_size(path: Path) -> int:
    """A file's size; links and devices are refused, because they lead out of the folder or never end."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    return found.st_size


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
