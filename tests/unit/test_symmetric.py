"""Windows whose pieces other ranks read: which bytes, and that nobody writes what somebody still reads.

Ranks are threads that share bytes, and one of them reads as late as it may: its copies wait until all others have
filled their next piece, of this operator or the next one, and stand there for it.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from math import prod
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pentode import device as devices
from pentode.dist import p2p, symmetric
from pentode.dist.mesh import Axis
from pentode.dist.p2p import Receipt, Ring
from pentode.dist.symmetric import ALIGN, HALVES, Window

CPU = torch.device("cpu")
PATIENCE = 20  # seconds after which threads wait for each other for ever
OPERATORS = ("gather", "scatter", "both", "gather", "gather", "scatter", "scatter", "both", "both")
ROWS, COLUMNS = 3, 5  # a piece is no multiple of a window's alignment


class Meeting:
    """Where ranks stand: at how many barriers each has come."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=PATIENCE)
        self.come = [0] * ranks
        self.changed = threading.Condition()

    def at(self, rank: int, count: int) -> None:
        with self.changed:
            self.come[rank] = count
            self.changed.notify_all()

    def wait_for_others(self, rank: int) -> None:
        """Return when all others have come to the barrier after the one that this rank came to last."""
        with self.changed:
            mine = self.come[rank]
            there = self.changed.wait_for(
                lambda: all(n > mine for other, n in enumerate(self.come) if other != rank), timeout=PATIENCE
            )
        assert there, f"rank {rank} waits at barrier {mine} for {self.come}"


class Handle:
    """What torch gives for a buffer, of one rank."""

    def __init__(self, meeting: Meeting, buffers: list[Tensor], rank: int) -> None:
        self.meeting, self.buffers, self.rank = meeting, buffers, rank

    def barrier(self, channel: int = 0) -> None:
        self.meeting.at(self.rank, self.meeting.come[self.rank] + 1)
        self.meeting.barrier.wait()

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, storage_offset: int = 0) -> Tensor:
        return self.buffers[rank].view(dtype)[storage_offset:][: prod(sizes)].view(sizes)


class Side:
    """The stream that copies; on the slow rank it begins as late as it may."""

    def __init__(self, handle: Handle, *, slow: bool) -> None:
        self.handle, self.slow = handle, slow

    def __enter__(self) -> None:
        if self.slow:
            self.handle.meeting.wait_for_others(self.handle.rank)

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def record_event(self) -> None: ...


def piece(operator: int, source: int, target: int) -> Tensor:
    """What `source` passes on to `target`; a gather's is for all, target 0."""
    numbers = torch.arange(ROWS * COLUMNS, dtype=torch.float64).view(ROWS, COLUMNS)
    return numbers + 100 * target + 1000 * source + 10000 * operator


def operate(kind: str, number: int, tp: Axis) -> None:
    """Pass pieces on as `parallel/tensor_overlap.py` does, and compare what comes."""
    others = range(1, tp.size)
    sent = piece(number, tp.rank, 0)
    ring = Ring(tp, device=CPU, nbytes=HALVES * tp.size * sent.nbytes)
    coming: list[tuple[Receipt, Tensor]] = []
    if kind != "scatter":
        for hop in others:
            source = (tp.rank + hop) % tp.size
            receipt = ring.start(sent, hop=tp.rank - source, into=torch.empty_like(sent))
            coming.append((receipt, piece(number, source, 0)))
    if kind != "gather":
        for hop in others:
            made = ring.room(ROWS, COLUMNS, dtype=torch.float64)
            made.copy_(piece(number, tp.rank, (tp.rank + hop) % tp.size))
            receipt = ring.start(made, hop=hop, into=torch.empty_like(made))
            coming.append((receipt, piece(number, (tp.rank - hop) % tp.size, tp.rank)))
    for receipt, expected in coming:
        (got,) = receipt.wait()
        assert torch.equal(got, expected), f"operator {number}, {kind}, on rank {tp.rank}"


@pytest.mark.parametrize(("ranks", "slow"), [(2, 0), (2, 1), (3, 1), (4, 3)])
def test_pieces_arrive_whole_however_late_they_are_read(ranks: int, slow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    half_bytes = HALVES * ranks * ALIGN  # of 120 bytes each: one piece for the gather, others for the scatter
    meeting, buffers = Meeting(ranks), [torch.zeros(HALVES * half_bytes, dtype=torch.uint8) for _ in range(ranks)]
    windows = [Window(Handle(meeting, buffers, rank), CPU, rank=rank, half_bytes=half_bytes) for rank in range(ranks)]
    for rank, window in enumerate(windows):
        monkeypatch.setattr(window, "side", Side(window.handle, slow=rank == slow))
    monkeypatch.setattr(p2p, "window", lambda axis, device, *, nbytes: windows[axis.rank])
    monkeypatch.setattr(devices, "current_stream", lambda _: SimpleNamespace(wait_event=lambda _: None))

    def rank_main(rank: int) -> None:
        try:
            for number, kind in enumerate(OPERATORS):
                operate(kind, number, Axis("tp", ranks, rank))
        finally:
            meeting.at(rank, 1000)  # it waits for nobody any more

    with ThreadPoolExecutor(ranks) as pool:
        found = [pool.submit(rank_main, rank) for rank in range(ranks)]
    for one in found:
        one.result()


def test_a_window_that_cannot_be_made_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no such memory here")

    monkeypatch.setattr(symmetric, "symmetric_memory", SimpleNamespace(empty=refuse, rendezvous=refuse))
    monkeypatch.setattr(symmetric, "_possible", lambda *_: True)
    assert symmetric.shared_buffer(Axis("tp"), CPU, nbytes=ALIGN) is None
