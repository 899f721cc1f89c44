"""Memory of other GPUs of this host, read directly: copy engines move it, and no multiprocessor is taken from the work.

NCCL's kernels take some, and what they hide under a product is lost again (figures: docs/performance.md). This is
the only user of torch's symmetric memory, whose module is still private.
"""

import socket
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from pentode import device as devices
from pentode import log
from pentode.dist.collectives import gather_objects
from pentode.dist.mesh import Axis

try:
    import torch.distributed._symmetric_memory as symmetric_memory
except ImportError:  # a torch without it: messages go through NCCL
    symmetric_memory: ModuleType | None = None

ALIGN = 256  # bytes, so that every tensor in a window starts where kernels like it
HALVES = 2
SIGNAL_BYTES = 4  # of one channel, for each rank


class Handle(Protocol):
    """What torch gives for a buffer that all ranks of a group have mapped. All but `get_buffer` is done by the stream.

    A signal of a channel is put once, and waited for once; whoever puts it again first waits for that.
    """

    @property
    def signal_pad_size(self) -> int: ...

    def barrier(self, channel: int = 0) -> None: ...

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, storage_offset: int = 0) -> Tensor: ...

    def put_signal(self, dst_rank: int, channel: int = 0, timeout_ms: int = 0) -> None: ...

    def wait_signal(self, src_rank: int, channel: int = 0, timeout_ms: int = 0) -> None: ...


class Window:
    """A buffer on each rank of a group, which the others read. Two halves, used in turn by one operator after another.

    An operator meets the others at least once (`start_read`). So when one fills a half again, all have met in the
    operator between, and nobody still reads what the half held before.
    """

    def __init__(self, handle: Handle, device: torch.device, *, rank: int, half_bytes: int) -> None:
        """`half_bytes`: what one operator may pass on."""
        self.handle, self.rank, self.half_bytes = handle, rank, half_bytes
        self.side = devices.new_stream(device)
        self._half, self._used = 0, 0

    def turn(self) -> None:
        """Begin an operator: use the other half."""
        self._half, self._used = 1 - self._half, 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> "Pane":
        """Room in this half for a tensor, at the same place in every rank's window."""
        start = self._half * self.half_bytes + self._used
        self._used += aligned(prod(shape) * dtype.itemsize)
        assert self._used <= self.half_bytes, f"a window of {self.half_bytes} bytes for {self._used}"
        return Pane(self, shape, dtype, start // dtype.itemsize)

    def start_read(self, pane: "Pane", rank: int, into: Tensor) -> "Read":
        """Begin to copy what `rank` has in its pane; every rank calls, when its own is filled, and goes on at once."""
        if not pane.shown:
            self.handle.barrier(channel=0)  # the stream goes on when all ranks have come here
            pane.shown = True
            self.side.wait_stream(devices.current_stream(into.device))
        with self.side:
            into.copy_(pane.on(rank))
        return Read(self.side.record_event(), into)


class Pane:
    """Room for one tensor in the windows of all ranks."""

    def __init__(self, window: Window, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> None:
        self.window, self._at, self.shown = window, (shape, dtype, offset), False
        self.here = self.on(window.rank)

    def on(self, rank: int) -> Tensor:
        """The tensor in that rank's window."""
        return self.window.handle.get_buffer(rank, *self._at)


class Read:
    """A copy on its way."""

    def __init__(self, event: torch.Event, into: Tensor) -> None:
        self.event, self.into = event, into

    def wait(self) -> None:
        """The stream goes on when the copy is there."""
        devices.current_stream(self.into.device).wait_event(self.event)


_windows: dict[str, Window | None] = {}  # by group; device memory that every operator of the group uses in turn


def window(axis: Axis, device: torch.device, *, nbytes: int) -> Window | None:
    """The axis's window, for operators that pass on so much; None where its ranks cannot read each other's memory.

    All ranks of the axis call, with the same numbers. A larger one is made when it is first asked for.
    """
    assert axis.group is not None, f"axis {axis.name} has size {axis.size} and no group"
    name, half_bytes = axis.group.group_name, aligned(nbytes) + axis.size * ALIGN  # one pane a rank, each aligned
    found = _windows.get(name)
    if name not in _windows or (found is not None and found.half_bytes < half_bytes):
        devices.synchronize(device)  # nobody reads the smaller one any more when all have made the larger one
        handle = shared_buffer(axis, device, nbytes=HALVES * half_bytes)
        _windows[name] = None if handle is None else Window(handle, device, rank=axis.rank, half_bytes=half_bytes)
    return _windows[name]


def forget() -> None:
    """Give the windows back, before the groups end."""
    _windows.clear()


def shared_buffer(axis: Axis, device: torch.device, *, nbytes: int, signals: int = 1) -> Handle | None:
    """torch's handle of a buffer that all ranks of the axis have mapped; None on all where one of them cannot.

    signals  channels of put_signal and wait_signal that are wanted
    """
    if not _possible(axis, device):
        return None
    assert symmetric_memory is not None, "no window without symmetric memory"
    handle: Handle | None = None
    try:
        handle = symmetric_memory.rendezvous(
            symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device), axis.group
        )
    except RuntimeError as error:
        log.once(f"{axis.name}: GPUs cannot read each other's memory ({error}); NCCL moves what overlaps")
    enough = handle is not None and signals * axis.size * SIGNAL_BYTES <= handle.signal_pad_size
    return handle if all(gather_objects(enough, axis)) else None


def _possible(axis: Axis, device: torch.device) -> bool:
    if symmetric_memory is None or not devices.is_gpu(device):
        return False
    places = gather_objects((_host(), device.index), axis)
    one_host = all(host == places[0][0] for host, _ in places)
    others = {index for _, index in places} - {device.index}
    return all(gather_objects(one_host and all(devices.reads(device, index) for index in others), axis))


def _host() -> tuple[str, str]:
    """What differs between hosts, and between containers of one."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot.read_text() if boot.exists() else ""


def aligned(size: int) -> int:
    """Bytes, rounded up to where a tensor may start."""
    return -(-size // ALIGN) * ALIGN
