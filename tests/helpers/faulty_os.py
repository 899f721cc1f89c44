"""Stand-ins for `os` in pentode.checkpoint.storage: one that fails at a chosen call, one that records what was done."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHANGING = ("mkdir", "open", "write", "fsync", "close", "rename", "unlink", "rmdir")


class Crash(BaseException):
    """The process is gone: nothing that it does afterwards has an effect."""


class FaultyOs:
    """`os`, whose changing call number `fail_at` raises: an OSError `code` once, or without one a Crash for good.

    A write that fails has written half of its bytes; an fsync does nothing, to save the tests' time. `calls` counts,
    so that a run without a fault tells how many places there are to fail at.
    """

    def __init__(self, *, fail_at: int | None = None, code: int | None = None) -> None:
        self.fail_at = fail_at
        self.code = code
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._counted(name, real) if name in CHANGING else real

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            number = len(self.calls)
            self.calls.append(name)
            if self.fail_at is not None and number >= self.fail_at and (number == self.fail_at or self.code is None):
                if number == self.fail_at and name == "write":
                    real(arguments[0], bytes(arguments[1][: len(arguments[1]) // 2]))
                if name == "close":
                    real(*arguments)
                raise Crash if self.code is None else OSError(self.code, os.strerror(self.code))
            return None if name == "fsync" else real(*arguments, **named)

        return call


@dataclass
class RecordingOs:
    """`os`, which also notes each change as (what, path, details), for `after_power_loss`."""

    events: list[tuple[Any, ...]] = field(default_factory=list)
    files: dict[int, list[Any]] = field(default_factory=dict)  # open file -> [path, bytes written]

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        file = os.open(path, flags, mode)
        self.files[file] = [str(path), 0]
        if flags & os.O_CREAT:
            self.events.append(("create", str(path)))
        return file

    def write(self, file: int, data: bytes) -> int:
        written = os.write(file, data)
        path, at = self.files[file]
        self.events.append(("write", path, at, bytes(data[:written])))
        self.files[file][1] += written
        return written

    def fsync(self, file: int) -> None:
        self.events.append(("fsync", self.files[file][0]))

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)
        self.events.append(("mkdir", str(path)))

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)
        self.events.append(("rename", str(source), str(target)))

    def unlink(self, path: Path) -> None:
        os.unlink(path)
        self.events.append(("unlink", str(path)))

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)
        self.events.append(("rmdir", str(path)))


class Inode(dict[str, "Inode"]):
    """A folder's names, or a file's bytes, as they are after a power loss."""

    def __init__(self, *, folder: bool) -> None:
        self.folder = folder
        self.data = bytearray()

    def write_out(self, path: Path) -> None:
        if not self.folder:
            path.write_bytes(self.data)
            return
        path.mkdir()
        for name, inode in self.items():
            inode.write_out(path / name)


def after_power_loss(events: list[tuple[Any, ...]], base: Path, survives: Callable[[], bool]) -> Inode:
    """The folder `base` as a disk may hold it when power fails after `events`.

    A change is certain once its file (for bytes) or folder (for names) was synced; each other one is kept if
    `survives` says so, independently of the rest, as a disk may reorder them.
    """
    root = Inode(folder=True)
    live: dict[str, Inode] = {str(base): root}
    changes: list[list[Any]] = []  # [certain, what must be synced, what is done to the disk]
    for what, path, *details in events:
        parent, name = live.get(str(Path(path).parent)), Path(path).name
        if what in ("mkdir", "create"):
            live[path] = Inode(folder=what == "mkdir")
            changes.append([False, parent, (_name, parent, name, live[path])])
        elif what == "write":
            changes.append([False, live[path], (_write, live[path], *details)])
        elif what == "fsync":
            for change in changes:
                change[0] = change[0] or change[1] is live[path]
        elif what == "rename":
            target = details[0]
            moved = {old: inode for old, inode in live.items() if old == path or old.startswith(path + "/")}
            for old, inode in moved.items():
                del live[old]
                live[target + old[len(path) :]] = inode
            changes.append([False, parent, (_rename, parent, name, Path(target).name, live[target])])
        else:
            del live[path]
            changes.append([False, parent, (_name, parent, name, None)])
    for certain, _, (act, *arguments) in changes:
        if certain or survives():
            act(*arguments)
    return root


def _name(folder: Inode, name: str, inode: Inode | None) -> None:
    if inode is None:
        folder.pop(name, None)
    else:
        folder[name] = inode


def _rename(folder: Inode, old: str, new: str, inode: Inode) -> None:
    folder.pop(old, None)
    folder[new] = inode


def _write(inode: Inode, at: int, data: bytes) -> None:
    inode.data.extend(bytes(max(0, at + len(data) - len(inode.data))))
    inode.data[at : at + len(data)] = data
