"""A model of a disk whose power fails: what was not synced may be there, in part, or not at all, each for itself.

A process that saves is traced: each of its changes is one event. The disk after a power failure is made of the events
before it: the bytes of a file are certain when the file was synced after they were written, a name in a folder when
the folder was. Every other change is there or not, independently of the rest, as disks and file systems may reorder
them; of bytes some blocks may be there. That is worse than any journalling file system is, and better than a disk that
lies about syncs.
"""

import base64
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

BLOCK = 512  # bytes that a disk writes at once
READING = {
    "path",
    "fspath",
    "listdir",
    "scandir",
    "stat",
    "lstat",
    "strerror",
    "getpid",
    "environ",
    "sep",
    "fstat",
    "posix_fadvise",
}


@dataclass(frozen=True)
class Event:
    """A change to the disk, or a sync: begun and done at these times, which are those of all processes of a host.

    what   create, mkdir, write, fsync, rename, remove
    path   of the file or folder, from the traced folder on
    other  of rename, the new path
    data   of write, what was written, from `at` on
    """

    what: str
    path: str
    begun: int = 0
    done: int = 0
    other: str = ""
    at: int = 0
    data: bytes = b""

    def as_json(self) -> str:
        """One line."""
        return json.dumps({**vars(self), "data": base64.b64encode(self.data).decode()})

    @classmethod
    def of_json(cls, line: str) -> "Event":
        """What `as_json` made a line of."""
        found = json.loads(line)
        return cls(**{**found, "data": base64.b64decode(found["data"])})


class TracingOs:
    """`os` as pentode.checkpoint.storage uses it, telling `tell` of each change below `base`; any thread may call.

    A function that changes files and that this does not know is refused, so that no change goes unseen.
    """

    def __init__(self, base: Path, tell: Callable[[Event], object]) -> None:
        self.base, self.tell = base, tell
        self.files: dict[int, list[Any]] = {}  # open file -> [path, bytes written]
        self.lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        if name in READING or name.isupper():
            return getattr(os, name)
        raise AssertionError(f"the model of a disk does not know os.{name}")

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        begun = time.monotonic_ns()
        file = os.open(path, flags, mode)
        self.files[file] = [self._inside(path), 0]
        if flags & os.O_CREAT:
            self._told("create", path, begun)
        return file

    def write(self, file: int, data: bytes | memoryview) -> int:
        begun = time.monotonic_ns()
        written = os.write(file, data)
        path, at = self.files[file]
        self._told("write", path, begun, at=at, data=bytes(memoryview(data)[:written]))
        self.files[file][1] += written
        return written

    def fsync(self, file: int) -> None:
        begun = time.monotonic_ns()
        os.fsync(file)
        self._told("fsync", self.files[file][0], begun)

    def close(self, file: int) -> None:
        self.files.pop(file, None)
        os.close(file)

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        begun = time.monotonic_ns()
        os.mkdir(path, mode)
        self._told("mkdir", path, begun)

    def rename(self, source: Path, target: Path) -> None:
        begun = time.monotonic_ns()
        os.rename(source, target)
        self._told("rename", source, begun, other=self._inside(target))

    def unlink(self, path: Path) -> None:
        begun = time.monotonic_ns()
        os.unlink(path)
        self._told("remove", path, begun)

    def rmdir(self, path: Path) -> None:
        begun = time.monotonic_ns()
        os.rmdir(path)
        self._told("remove", path, begun)

    def _inside(self, path: Path | str) -> str:
        return os.path.relpath(path, self.base) if os.path.isabs(path) else str(path)

    def _told(self, what: str, path: Path | str, begun: int, **more: Any) -> None:
        with self.lock:
            self.tell(Event(what, self._inside(path), begun, time.monotonic_ns(), **more))


@dataclass(eq=False)
class Node:
    """A file's bytes, or a folder's names."""

    folder: bool
    data: bytearray = field(default_factory=bytearray)
    names: dict[str, "Node"] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Node":
        """What stands at a path, all of it certain."""
        if not path.is_dir():
            return cls(folder=False, data=bytearray(path.read_bytes()))
        return cls(folder=True, names={name: cls.read(path / name) for name in os.listdir(path)})

    def write_out(self, path: Path) -> None:
        """Make files and folders of it."""
        if not self.folder:
            path.write_bytes(self.data)
            return
        path.mkdir()
        for name, node in self.names.items():
            node.write_out(path / name)


@dataclass
class _Change:
    """A change that a sync of `by`, begun later, makes certain; `act` does it, to some blocks if told which."""

    by: Node
    done: int
    act: Callable[[Callable[[], bool] | None], None]
    certain: bool = False


def after_power_loss(start: Node, events: Sequence[Event], draw: Random) -> Node:
    """The disk that held `start`, which is changed, when power fails after `events`, as `draw` has it."""
    changes = _changes(start, events)
    keep = _keeping(draw, sum(not change.certain for change in changes))
    for change in changes:
        if change.certain:
            change.act(None)
        elif keep():
            torn = draw.random() < 0.3
            change.act((lambda: draw.random() < 0.5) if torn else None)
    return start


def _keeping(draw: Random, count: int) -> Callable[[], bool]:
    """Which of so many uncertain changes are kept: none, all, all but one, one alone, or each by chance."""
    how, left = draw.randrange(6), iter(range(count))
    chosen = draw.randrange(count) if count else 0
    if how < 2:
        return lambda: how == 1
    if how < 4:
        return lambda: (next(left) == chosen) == (how == 3)
    share = draw.choice((0.1, 0.5, 0.9))
    return lambda: draw.random() < share


def _changes(start: Node, events: Iterable[Event]) -> list[_Change]:
    """What events do, in order, and whether it is certain at their end."""
    live = dict(_paths(start, ""))
    changes: list[_Change] = []
    for event in events:
        above, _, name = event.path.rpartition("/")
        node, parent = live.get(event.path), live[above or "."]
        if event.what in ("create", "mkdir"):
            made = live[event.path] = Node(folder=event.what == "mkdir")
            changes.append(_Change(parent, event.done, _naming(parent, name, made)))
        elif node is None:
            raise AssertionError(f"{event.what} of {event.path}, which is not there")
        elif event.what == "write":
            changes.append(_Change(node, event.done, _writing(node, event)))
        elif event.what == "fsync":
            for change in changes:
                if change.by is node and change.done <= event.begun:
                    change.certain = True
        elif event.what == "rename":
            assert event.other.rpartition("/")[0] == above, f"{event.path} is renamed into another folder"
            for old in [old for old in live if old == event.path or old.startswith(f"{event.path}/")]:
                live[event.other + old[len(event.path) :]] = live.pop(old)
            changes.append(_Change(parent, event.done, _renaming(parent, name, event.other.rpartition("/")[2], node)))
        else:
            del live[event.path]
            changes.append(_Change(parent, event.done, _naming(parent, name, None)))
    return changes


def _paths(node: Node, path: str) -> Iterable[tuple[str, Node]]:
    yield path or ".", node
    for name, inside in node.names.items():
        yield from _paths(inside, f"{path}/{name}" if path else name)


def _naming(parent: Node, name: str, node: Node | None) -> Callable[[Callable[[], bool] | None], None]:
    def act(blocks: Callable[[], bool] | None) -> None:
        if node is None:
            parent.names.pop(name, None)
        else:
            parent.names[name] = node

    return act


def _renaming(parent: Node, old: str, new: str, node: Node) -> Callable[[Callable[[], bool] | None], None]:
    def act(blocks: Callable[[], bool] | None) -> None:
        parent.names.pop(old, None)
        parent.names[new] = node

    return act


def _writing(node: Node, event: Event) -> Callable[[Callable[[], bool] | None], None]:
    def act(blocks: Callable[[], bool] | None) -> None:
        end = event.at + len(event.data)
        node.data.extend(bytes(max(0, end - len(node.data))))
        for at in range(0, len(event.data), BLOCK if blocks is not None else len(event.data) or 1):
            if blocks is None or blocks():
                piece = event.data[at : at + BLOCK] if blocks is not None else event.data
                node.data[event.at + at : event.at + at + len(piece)] = piece

    return act
