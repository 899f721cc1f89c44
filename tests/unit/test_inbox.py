"""Messages written into the receiver's memory: each arrives whole and in its order, however late it is taken.

Ranks are threads, and so is each stream that sends; signals block as a GPU's do.
"""

import threading
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pentode import device as devices
from pentode.dist import inbox as inbox_module
from pentode.dist import p2p
from pentode.dist.inbox import SIDES, Inbox, open_inbox
from pentode.dist.mesh import Axis
from pentode.dist.p2p import Channels, Form
from pentode.dist.symmetric import ALIGN
from pentode.parallel.pipeline.schedules import Action, make_schedule
from pentode.parallel.pipeline.simulate import Transfer, messages_at_once, with_transfers

CPU = torch.device("cpu")
PATIENCE = 20  # seconds after which a thread waits for a signal for ever


class Signals:
    """Each is there or not: putting waits until it is not, waiting until it is, and takes it away."""

    def __init__(self) -> None:
        self.there: set[tuple[int, int, int]] = set()  # (from, to, channel)
        self.changed = threading.Condition()

    def put(self, key: tuple[int, int, int]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: key not in self.there, timeout=PATIENCE), f"{key} was never taken"
            self.there.add(key)
            self.changed.notify_all()

    def take(self, key: tuple[int, int, int]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.there, timeout=PATIENCE), f"{key} never came"
            self.there.remove(key)
            self.changed.notify_all()


class Handle:
    """What torch gives for a buffer, of one rank."""

    signal_pad_size = 1 << 20

    def __init__(self, signals: Signals, buffers: list[Tensor], rank: int) -> None:
        self.signals, self.buffers, self.rank = signals, buffers, rank

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, storage_offset: int = 0) -> Tensor:
        return self.buffers[rank].view(dtype)[storage_offset:][: prod(sizes)].view(sizes)

    def put_signal(self, dst_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        self.signals.put((self.rank, dst_rank, channel))

    def wait_signal(self, src_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        self.signals.take((src_rank, self.rank, channel))


class Stream:
    """Work beside a rank's own; here a sender has a thread of its own instead."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def record_event(self) -> SimpleNamespace:
        return SimpleNamespace(query=lambda: True)


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "new_stream", lambda _: Stream())
    monkeypatch.setattr(devices, "current_stream", lambda _: SimpleNamespace(wait_event=lambda _: None))


def inboxes(ranks: int, *, slots: int, slot_bytes: int) -> list[Inbox]:
    signals = Signals()
    buffers = [torch.zeros(SIDES * slots * slot_bytes, dtype=torch.uint8) for _ in range(ranks)]
    return [
        Inbox(Handle(signals, buffers, rank), Axis("pp", ranks, rank), device=CPU, slots=slots, slot_bytes=slot_bytes)
        for rank in range(ranks)
    ]


def message(source: int, target: int, number: int) -> Tensor:
    return torch.full((5, 5), 10_000.0 * source + 1000 * target + number, dtype=torch.float64)  # most of a slot


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_all_arrive_in_order_though_slots_are_few(ranks: int, slots: int) -> None:
    boxes, count = inboxes(ranks, slots=slots, slot_bytes=ALIGN), 20
    pairs = {(i, (i + hop) % ranks) for i in range(ranks) for hop in (1, -1)}

    def send(source: int, target: int) -> None:
        for number in range(count):
            boxes[source].send(message(source, target, number), to=target)

    def receive(source: int, target: int) -> None:
        for number in range(count):
            into = torch.empty(5, 5, dtype=torch.float64)
            boxes[target].receive(into, source=source).wait()
            assert torch.equal(into, message(source, target, number)), f"{source} -> {target}, message {number}"

    run_all([(act, pair) for pair in pairs for act in (send, receive)])


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_each_message_has_its_slot_alone(ranks: int) -> None:
    boxes, slots = inboxes(ranks, slots=2, slot_bytes=ALIGN), range(2)
    pairs = sorted({(i, (i + hop) % ranks) for i in range(ranks) for hop in (1, -1)})
    for source, target in pairs:
        for number in slots:
            boxes[source].send(message(source, target, number), to=target)
    for source, target in pairs:
        for number in slots:
            into = torch.empty(5, 5, dtype=torch.float64)
            boxes[target].receive(into, source=source).wait()
            assert torch.equal(into, message(source, target, number)), f"{source} -> {target}, message {number}"


@pytest.mark.parametrize("engine", ["afab", "1f1b", "interleaved"])
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_the_slots_of_a_schedule_are_enough_for_its_order(pp: int, engine: str) -> None:
    schedule = make_schedule(engine, pp=pp, micro_batches=2 * pp, stages_per_rank=2 if engine == "interleaved" else 1)
    programs = with_transfers(schedule)
    slots = max(map(messages_at_once, programs))
    boxes = inboxes(pp, slots=slots, slot_bytes=ALIGN)
    sends: dict[tuple[int, int], list[Tensor]] = defaultdict(list)

    def number(key: tuple[str, int, int]) -> Tensor:
        return torch.tensor([float(key[0] == "gradient"), key[1], key[2]])

    for rank, program in enumerate(programs):
        for step in program:
            if step.kind == "SEND":
                sends[rank, step.peer].append(number((step.what, step.stage, step.micro_batch)))

    def send(source: int, target: int) -> None:  # as early as it may be
        for tensor in sends[source, target]:
            boxes[source].send(tensor, to=target)

    def run(rank: int) -> None:
        arriving = {}
        for step in programs[rank]:
            if step.kind == "POST":
                key = step.what, step.stage, step.micro_batch
                into = torch.empty(3)
                arriving[key] = boxes[rank].receive(into, source=step.peer), into
            elif step.kind != "SEND":
                made = ("activation", step.stage - 1) if step.kind == "F" else ("gradient", step.stage + 1)
                wanted = (*made, step.micro_batch)
                if wanted in arriving:
                    coming, into = arriving.pop(wanted)
                    coming.wait()
                    assert torch.equal(into, number(wanted)), f"{rank}: {wanted}"
        assert not arriving

    run_all([(send, pair) for pair in sends] + [(run, (rank,)) for rank in range(pp)])


def test_ranks_that_cannot_write_each_others_memory_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "shared_buffer", lambda *_, **__: None)
    assert open_inbox(Axis("pp", 2, 0), CPU, slots=2, nbytes=100) is None


def test_the_inboxes_of_an_axis_have_slots_for_both_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    pp, handle, asked = Axis("pp", 4, 1), Handle(Signals(), [], 1), list[tuple]()
    made = lambda axis, device, **options: asked.append((axis, options)) or handle  # noqa: E731
    monkeypatch.setattr(inbox_module, "shared_buffer", made)
    found = open_inbox(pp, CPU, slots=3, nbytes=ALIGN + 1)
    assert found is not None
    assert found.axis is pp
    assert (found.handle, found.slots, found.slot_bytes) == (handle, 3, 2 * ALIGN)
    assert asked == [(pp, {"nbytes": SIDES * 3 * 2 * ALIGN, "signals": 2 * 3})]


def test_a_pipelines_messages_go_through_the_inbox_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = inboxes(2, slots=2, slot_bytes=ALIGN)
    groups: dict = {(0, 1): "there", (1, 0): "back"}
    ends = [Channels(Axis("pp", 2, rank), groups, device=CPU) for rank in range(2)]
    large = torch.zeros(ALIGN)
    elsewhere: list[tuple[Tensor, str]] = []
    done = SimpleNamespace(is_completed=lambda: True, wait=lambda: None)
    monkeypatch.setattr(p2p.dist, "isend", lambda x, *, group, group_dst: elsewhere.append((x, group)) or done)
    monkeypatch.setattr(p2p.dist, "irecv", lambda x, *, group, group_src: elsewhere.append((x, group)) or done)
    for end, box in zip(ends, boxes, strict=True):
        end.inbox = box

    def send() -> None:
        for number in range(6):
            ends[0].send((message(0, 1, number), large), to=1)
        ends[0].flush()

    def receive() -> None:
        form = Form((5, 5), torch.float64)
        for number in range(6):
            found, other = ends[1].receive([form, Form(large.shape, large.dtype)], source=0).wait()
            assert torch.equal(found, message(0, 1, number))
            assert other.shape == large.shape

    run_all([(send, ()), (receive, ())])
    assert [boxes[0]._sent[1], boxes[1]._received[0]] == [6, 6]
    assert len(elsewhere) == 12
    assert {group for _, group in elsewhere} == {"there"}


def test_an_inbox_has_room_for_the_largest_message_of_any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    pp = Axis("pp", 2, 1)
    monkeypatch.setattr(p2p.devices, "is_gpu", lambda device: True)
    monkeypatch.setattr(p2p, "gather_objects", lambda value, axis: [300, value] if axis is pp else [value])
    monkeypatch.setattr(p2p, "open_inbox", lambda axis, device, **options: asked.append((axis, options)))
    Channels(pp, {}, device=CPU).open_inbox(slots=3, nbytes=100)
    assert asked == [(pp, {"slots": 3, "nbytes": 300})]


def run_all(jobs: list) -> None:
    with ThreadPoolExecutor(len(jobs)) as pool:
        found: list[Future] = [pool.submit(act, *arguments) for act, arguments in jobs]
    for one in found:
        one.result()


def test_messages_that_are_used_out_of_order_count_until_they_are_used() -> None:
    first, second, third = (Transfer("POST", "activation", 0, i, 0) for i in range(3))
    in_order = [first, Action("F", 1, 0), second, Action("F", 1, 1), third, Action("F", 1, 2)]
    newest_first = [first, second, third, Action("F", 1, 2), Action("F", 1, 0), Action("F", 1, 1)]
    assert messages_at_once(in_order) == 1
    assert messages_at_once(newest_first) == 3
    assert messages_at_once([Action("F", 0, 0), Action("B", 0, 0)]) == 0
