"""Saving beside training: what a rank writes is copied away while the next step computes, and a thread writes it.

    snapshot  of all that this rank writes, as it stands now: at once into memory of the device, where there is room, or
              by and by into memory of the host, before the next update changes it
    persist   a thread writes the host's copies into files, hashing them, and syncs them
    publish   it agrees with the threads of the other ranks (`dist/board.py`) that all is on the disk

`checkpoint/save.py` does the last two, as it does for a run that waits for them, and so the bytes are the same.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pentode import device as devices
from pentode.checkpoint.layout import Saved, entries

CHUNK = 64 * 2**20  # bytes; a power of two, to which the allocator of pinned memory rounds up


class HostCache:
    """Memory of the host through which snapshots go, in chunks that are made when first needed and then used again.

    limit  bytes in all, at least a chunk; None: as much as a snapshot has
    """

    def __init__(
        self, device: torch.device, *, limit: int | None = None, pinned: bool = True, chunk: int = CHUNK
    ) -> None:
        self.device, self.pinned, self.chunk = device, pinned, chunk
        self._left = None if limit is None else max(1, limit // chunk)
        self._free: list[Tensor] = []

    def take(self) -> Tensor | None:
        """A chunk [chunk] uint8; None while all are in use."""
        if self._free:
            return self._free.pop()
        if self._left == 0:
            return None
        if self._left is not None:
            self._left -= 1
        return devices.host_bytes(self.chunk, self.device, pinned=self.pinned)

    def give_back(self, chunk: Tensor) -> None:
        """The chunk may be used again."""
        self._free.append(chunk)


@dataclass(frozen=True)
class _Part:
    """What fills a chunk, or a part of one at the end of a group: runs of bytes on the device, one after the other."""

    group: str
    sources: list[Tensor]


@dataclass(frozen=True)
class _Copy:
    """A part in its chunk, `size` bytes of it, from the moment `arrived` on."""

    part: _Part
    chunk: Tensor
    size: int
    arrived: torch.Event | None


class Snapshot:
    """All tensors that this rank writes, as they stand when it is made; another thread reads their bytes, once.

    Until `wait_for_copies` has returned the tensors must not change. `staged`: they are copied on the device at once,
    in the order of its work, and may change right away.
    """

    def __init__(
        self, groups: Mapping[str, Mapping[str, Saved]], cache: HostCache, lane: devices.Lane, *, staged: bool
    ) -> None:
        self._cache, self._lane, self.staged = cache, lane, staged
        tensors = {group: [tensor.detach() for _, tensor in entries(groups[group])] for group in sorted(groups)}
        if staged:
            tensors = {group: [_contiguous_copy(tensor) for tensor in found] for group, found in tensors.items()}
        self._to_copy = deque(part for group in tensors for part in _parts(group, tensors[group], cache.chunk))
        self._copies: deque[_Copy] = deque()
        self._all_asked_for = threading.Event()
        self._last: torch.Event | None = None
        self._lane.after(devices.mark(cache.device))

    def wait_for_copies(self) -> None:
        """Have this thread, and the device, change nothing that is still to be copied."""
        if not self.staged:
            self._all_asked_for.wait()
            devices.go_on_after(self._last, self._cache.device)

    def copy(self) -> None:
        """Begin to copy what there is room for; to be called before anything is waited for, and then by `read`."""
        while self._to_copy and (chunk := self._cache.take()) is not None:
            part, size = self._to_copy.popleft(), 0
            for source in part.sources:
                self._lane.copy(source, into=chunk[size : size + source.numel()])
                size += source.numel()
            self._last = self._lane.mark()
            self._copies.append(_Copy(part, chunk, size, self._last))
        if not self._to_copy and not self._all_asked_for.is_set():
            self._all_asked_for.set()
            devices.wait_until(self._last)
            for copy in self._copies:
                copy.part.sources.clear()

    def read(self, group: str) -> Iterator[memoryview]:
        """The bytes of a group's tensors in file order; groups must be read in the order of their names, to the end."""
        self.copy()
        while self._copies and self._copies[0].part.group == group:
            found = self._copies[0]
            devices.wait_until(found.arrived)
            found.part.sources.clear()  # what was staged is given back as soon as it is on the host
            yield memoryview(found.chunk.numpy())[: found.size]
            self._give_back()
            self.copy()

    def release(self) -> None:
        """Give back all memory, and copy no more, whatever was read."""
        self._to_copy.clear()
        try:
            while self._copies:
                self._give_back()
        finally:
            self._all_asked_for.set()  # whatever the device says: an update may wait for this

    def _give_back(self) -> None:
        found = self._copies.popleft()
        devices.wait_until(found.arrived)
        self._cache.give_back(found.chunk)


def _contiguous_copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _parts(group: str, tensors: Sequence[Tensor], size: int) -> Iterator[_Part]:
    """A group's tensors, one after the other, cut into parts of `size` bytes."""
    sources: list[Tensor] = []
    room = size
    for tensor in tensors:
        rest = tensor.reshape(-1).view(torch.uint8)
        while rest.numel():
            sources.append(rest[:room])
            rest, room = rest[room:], room - sources[-1].numel()
            if not room:
                yield _Part(group, sources)
                sources, room = [], size
    if sources:
        yield _Part(group, sources)


class Background:
    """One piece of work at a time, in a thread; what it raised is told when it is waited for."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self._thread: threading.Thread | None = None
        self.error: BaseException | None = None  # that the work has raised

    def start(self, work: Callable[[], object]) -> None:
        """Begin; nothing else may be under way."""
        assert self._thread is None, "a save is under way; wait for it first"
        self.cancelled.clear()  # what an earlier one was given up for is over
        self._thread = threading.Thread(target=self._do, args=(work,), name="save", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether work was begun that nobody has waited for."""
        return self._thread is not None

    @property
    def failed(self) -> bool:
        """Whether the work has raised something."""
        return self.error is not None

    def is_done(self, *, within: float = 0.0) -> bool:
        """Whether the work has ended, or does within so many seconds; true where there is none."""
        if self._thread is not None:
            self._thread.join(within)
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Return when the work has ended; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _do(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001
            self.error = error
