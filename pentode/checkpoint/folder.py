"""A checkpoint's folder: opened, proven against its manifest, and the newest that is whole found. No torch is needed.

Nothing is trusted before its checksum is right; names cannot leave the folder; there is no pickle.
"""

import re
import secrets
import stat
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pentode import log
from pentode.checkpoint import storage
from pentode.checkpoint.manifest import MANIFEST, STATE, STEP_NAME, Manifest, NewerFormatError, parse_json
from pentode.errors import CheckpointError

MANIFEST_LIMIT = 64 * 2**20  # bytes
HF_FOLDERS = "hf"  # in a run's folder: Hugging Face folders of its checkpoints, by step
HEADER_LIMIT = 100 * 2**20  # bytes, as in the safetensors library
SQUEEZE = 1  # how hard headers are compressed: the least gives a tenth already
TENSOR_FILE = re.compile(r"([a-z0-9_]+)-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)  # group, number, count


class DamagedError(CheckpointError):
    """A checkpoint that is not what was saved; an older one may be. `what` is the message without its remedy."""

    def __init__(self, what: str, *, remedy: str = "restore the checkpoint from a copy, or use another") -> None:
        super().__init__(f"{what}; {remedy}")
        self.what = what


Damages = dict[Path, DamagedError]  # of checkpoints, by their folders


class Header(NamedTuple):
    """A tensor file's header, as it is kept and sent: where the file's data begins, and the JSON before it."""

    begin: int
    packed: bytes

    @classmethod
    def pack(cls, begin: int, text: bytes) -> "Header":
        """Compress it: names and numbers of thousands of boxes, much alike."""
        return cls(begin, zlib.compress(text, SQUEEZE))

    def unpack(self) -> tuple[int, bytes]:
        """What was packed."""
        return self.begin, zlib.decompress(self.packed)


@dataclass
class Checkpoint:
    """An open checkpoint. Its files are checked when they are first read, or all at once by `verify`.

    heard  headers of tensor files that another rank may have read, by name
    """

    folder: Path
    manifest: Manifest
    state: dict[str, Any] = field(default_factory=dict)
    proven: set[str] = field(default_factory=set)
    heard: dict[str, Header] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Updates done when it was saved."""
        return self.manifest.step

    def verify(self) -> None:
        """Compare every file with the manifest; raises DamagedError for the first that is another."""
        for damage in self.damages():
            raise damage

    def damages(self, *, checksums: bool = True) -> Iterator["DamagedError"]:
        """Compare every file with the manifest, or only their sizes; what is wrong, one for each file."""
        for name in self.manifest.files:
            try:
                if checksums:
                    self.prove(name)
                else:
                    self._check_size(name)
            except DamagedError as error:
                yield error

    def prove(self, name: str) -> None:
        """Compare a file with the manifest, once; raises DamagedError where it is another or cannot be read."""
        if name in self.proven:
            return
        self._check_size(name)
        try:
            same = storage.hash_file(self.folder / name) == self.manifest.files[name]
        except OSError as error:
            raise self._unreadable(name, error) from error
        if not same:
            raise DamagedError(f"{self}: {name} is damaged, its checksum is wrong")
        self.proven.add(name)

    def file(self, name: str) -> bytes:
        """The bytes of one of the small files."""
        self.prove(name)
        return (self.folder / name).read_bytes()

    def read_state(self) -> None:
        """Read state.json into `state`; raises DamagedError."""
        if STATE not in self.manifest.files:
            raise DamagedError(f"{self}: it has no {STATE}")
        try:
            self.state.update(parse_json(self.file(STATE)))
        except ValueError as error:
            raise DamagedError(f"{self.folder / STATE}: {reason(error)}") from error

    def groups(self) -> list[str]:
        """The groups that it has tensor files of."""
        found = map(TENSOR_FILE.fullmatch, self.manifest.files)
        return sorted({match[1] for match in found if match})

    def files_of(self, group: str) -> list[str]:
        """The names of a group's files, one per rank that wrote; all must be there."""
        found = [
            match for match in map(TENSOR_FILE.fullmatch, sorted(self.manifest.files)) if match and match[1] == group
        ]
        if not found:
            remedy = "; set checkpoints.load_optimizer to false" if group == "optimizer" else ""
            raise CheckpointError(f"{self}: it has no {group}{remedy}")
        world = int(found[0][3])
        if [(int(match[2]), int(match[3])) for match in found] != [(rank, world) for rank in range(world)]:
            raise DamagedError(f"{self}: {group} should be {world} files, one per rank")
        return [match[0] for match in found]

    def header(self, name: str, *, prove: bool = True) -> tuple[int, bytes]:
        """Where a tensor file's data begins, and the JSON before it; without `prove` nothing is known to be right."""
        if name in self.heard:
            return self.heard[name].unpack()
        if prove:
            self.prove(name)
        else:
            self._check_size(name)
        size = self.manifest.files[name].size
        try:
            with (self.folder / name).open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, HEADER_LIMIT):
                    raise ValueError(f"its header claims {length:,} bytes")
                return 8 + length, file.read(length)
        except (OSError, ValueError) as error:
            raise DamagedError(f"{self}: {name}: {reason(error)}") from error

    def __str__(self) -> str:
        return f"checkpoint {self.step} in {self.folder.parent}"

    def _check_size(self, name: str) -> None:
        facts = self.manifest.files.get(name)
        if facts is None:
            raise CheckpointError(f"{self}: it has no {name}")
        try:
            size = _regular_size(self.folder / name)
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from error
        if size != facts.size:
            raise DamagedError(f"{self}: {name} has {size:,} bytes, not {facts.size:,}")

    def _unreadable(self, name: str, error: Exception) -> "DamagedError":
        return DamagedError(f"{self}: {name} cannot be read ({reason(error)})")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open one checkpoint by its folder; raises CheckpointError where that is none, or is damaged."""
    checkpoint = with_manifest(folder)
    checkpoint.read_state()
    return checkpoint


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that a user means by a folder: its own, or a run's, whose newest whole one it is."""
    if (path / MANIFEST).exists():
        return open_checkpoint(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give the folder of a checkpoint, or of a run")
    found = newest(path)
    if found is None:
        raise CheckpointError(f"{path}: holds no checkpoint; give the folder of a checkpoint, or of a run")
    return found


def damages(folder: Path, *, checksums: bool = True) -> Iterator[CheckpointError]:
    """All that is wrong with a checkpoint, one for each file; without `checksums` no more than names and sizes tell."""
    try:
        checkpoint = with_manifest(folder)
    except CheckpointError as error:
        yield error
        return
    found = list(checkpoint.damages(checksums=checksums))
    yield from found
    if found:
        return
    try:
        checkpoint.read_state()
        for group in checkpoint.groups():
            checkpoint.files_of(group)
    except CheckpointError as error:
        yield error


def with_manifest(folder: Path) -> Checkpoint:
    """A checkpoint of which nothing but the manifest is read yet, not even its state; raises CheckpointError."""
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
        raise DamagedError(f"{path}: {reason(error)}") from error
    return Checkpoint(folder, manifest)


def newest(root: Path, *, quarantine: bool = False, fallback: bool = True) -> Checkpoint | None:
    """The newest checkpoint in a run's folder whose every file is proven right; None if the folder holds none.

    Each damaged one that is newer gets a line in the log and, with `quarantine`, another name (.bad-<step>-...): only
    the process that trains there should ask for that. Damaged ones and no good one is a CheckpointError, and without
    `fallback` so is a damaged newest one.
    """
    found, damaged = first_whole(steps(root), _open_whole, fallback=fallback)
    if found is not None:
        tell_damages(damaged, found)
        if quarantine:
            set_aside(damaged)
    return found


def first_whole(
    folders: Sequence[Path], open_whole: Callable[[Path], Checkpoint], *, fallback: bool = True
) -> tuple[Checkpoint | None, Damages]:
    """The first of these that `open_whole` raises no DamagedError for, and those before it; see `newest`."""
    damaged: Damages = {}
    for folder in folders:
        try:
            return open_whole(folder), damaged
        except DamagedError as error:
            if not fallback:
                what = f"{error.what}; restore it from a copy or remove it, or set checkpoints.on_corrupt to fallback"
                raise CheckpointError(what) from error
            damaged[folder] = error
    for folder, error in damaged.items():
        raise CheckpointError(f"{error}; no older checkpoint in {folder.parent} is whole, so nothing was trained")
    return None, damaged


def tell_damages(damaged: Damages, found: Checkpoint) -> None:
    """A line in the log for each checkpoint that was passed over before this one."""
    for error in damaged.values():
        log.warning(f"{error.what}; going on from step {found.step}")


def set_aside(damaged: Collection[Path]) -> None:
    """Give checkpoints names under which nobody takes them for any (.bad-<step>-...)."""
    for folder in damaged:
        with storage.explained(folder.parent):
            storage.rename(folder, folder.with_name(f".bad-{folder.name}-{secrets.token_hex(4)}"))


def _open_whole(folder: Path) -> Checkpoint:
    checkpoint = open_checkpoint(folder)
    checkpoint.verify()
    return checkpoint


def steps(root: Path) -> list[Path]:
    """The folders in `root` that are named as checkpoints are, the newest first."""
    found = [path for path in root.glob("*") if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: -int(path.name))


def _regular_size(path: Path) -> int:
    """A file's size; links and devices are refused, because they lead out of the folder or never end."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    return found.st_size


def reason(error: Exception) -> str:
    """What a file system or a parser refused, without the path that the message names already."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
