"""Windows whose pieces other ranks read: which bytes, and that nobody writes what somebody still reads.

Ranks are threads that share bytes, and one of them reads as late as it may: its copies wait until all others have
filled their next piece, of this operator or the next one, and stand there for it.
"""

import threading
from collections.abc import Callable
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
ROWS, COLUMNS = 5, 5  # a piece is no multiple of a window's alignment, and longer than half of it


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
    half_bytes = HALVES * ranks * ALIGN  # of 200 bytes each: one piece for the gather, others for the scatter
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


TP = Axis("tp", 2, 1, SimpleNamespace(group_name="tp's"))  # pyright: ignore[reportArgumentType]


def hears(*others: object) -> Callable[[object, Axis], list[object]]:
    """`gather_objects` of tp, whose first rank says these one after another."""
    said = iter(others)

    def gather_objects(value: object, axis: Axis) -> list[object]:
        assert axis is TP
        return [next(said), value]

    return gather_objects


def test_a_window_has_room_for_a_pane_of_each_rank_and_a_larger_one_is_made_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Axis, int]] = []
    monkeypatch.setattr(symmetric, "_windows", {})
    monkeypatch.setattr(symmetric, "shared_buffer", lambda axis, device, *, nbytes: asked.append((axis, nbytes)) or "x")
    for name in ("synchronize", "new_stream"):
        monkeypatch.setattr(devices, name, lambda device: None)
    first = symmetric.window(TP, CPU, nbytes=ALIGN + 1)
    assert first is not None
    assert (first.rank, first.half_bytes) == (1, 4 * ALIGN)
    assert symmetric.window(TP, CPU, nbytes=2 * ALIGN) is first
    assert symmetric.window(TP, CPU, nbytes=2 * ALIGN + 1) is not first
    assert [axis is TP for axis, _ in asked] == [True, True]
    assert [nbytes for _, nbytes in asked] == [HALVES * 4 * ALIGN, HALVES * 5 * ALIGN]


@pytest.mark.parametrize(("signals", "other", "made"), [(2, True, True), (3, True, False), (2, False, False)], ids=str)
def test_all_ranks_have_a_buffer_or_none(
    signals: int, other: bool, made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, groups = SimpleNamespace(signal_pad_size=16), list[object]()  # 4 bytes a channel for each of two ranks
    memory = SimpleNamespace(empty=torch.empty, rendezvous=lambda buffer, group: groups.append(group) or handle)
    monkeypatch.setattr(symmetric, "symmetric_memory", memory)
    monkeypatch.setattr(symmetric, "_possible", lambda axis, device: axis is TP)
    monkeypatch.setattr(symmetric, "gather_objects", hears(other))
    found = symmetric.shared_buffer(TP, CPU, nbytes=ALIGN, signals=signals)
    assert found is (handle if made else None)
    assert groups == [TP.group]


@pytest.mark.parametrize(
    ("host", "reads", "other", "possible"),
    [
        ("here", True, True, True),
        ("there", True, True, False),
        ("here", False, True, False),
        ("here", True, False, False),
    ],
)
def test_all_ranks_of_one_host_that_read_each_others_memory_do_so_or_none(
    host: str, reads: bool, other: bool, possible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr(symmetric, "symmetric_memory", SimpleNamespace())
    monkeypatch.setattr(symmetric, "_host", lambda: "here")
    monkeypatch.setattr(devices, "is_gpu", lambda device: True)
    monkeypatch.setattr(devices, "reads", lambda device, index: read.append(index) or reads)
    monkeypatch.setattr(symmetric, "gather_objects", hears((host, 0), other))
    assert symmetric._possible(TP, SimpleNamespace(index=1)) is possible  # pyright: ignore[reportArgumentType]
    assert read == ([0] if host == "here" else [])


def test_tensors_start_where_kernels_like_it() -> None:
    assert [symmetric.aligned(size) for size in (1, ALIGN, ALIGN + 1, 3 * ALIGN)] == [
        ALIGN,
        ALIGN,
        2 * ALIGN,
        3 * ALIGN,
    ]
