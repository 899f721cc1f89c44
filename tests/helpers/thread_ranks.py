"""Several ranks that save together in one process, as threads: fast enough to fail each of their calls once."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from pentode.checkpoint import storage
from pentode.dist.mesh import Axis
from pentode.errors import PentodeError
from tests.helpers.faulty_os import FaultyOs

PATIENCE = 60  # seconds after which a rank that waits for others has found a hang


class Meeting:
    """`gather_objects` between threads; where one of them is gone, the others fail instead of waiting."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.values: list[object] = [None] * size

    def gather_objects(self, value: object, axis: Axis) -> list[object]:
        self.values[axis.rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class OsOfRank:
    """`os`, another one for each thread."""

    def __init__(self) -> None:
        self.own = threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own.os, name)


def on_thread_ranks(work: Callable[[Axis], object], systems: list[FaultyOs]) -> list[BaseException | None]:
    """Call `work` with the world of each rank, on the `os` of that rank; what each one raised.

    An error that all ranks are told leaves a rank alive; any other is its end, a broken connection to the others.
    """
    meeting, each = Meeting(len(systems)), OsOfRank()

    def rank_main(rank: int) -> None:
        each.own.os = systems[rank]
        work(Axis("world", len(systems), rank))

    def note_the_end(rank: Future[None]) -> None:
        error = rank.exception()
        if error is not None and not (isinstance(error, PentodeError) and error.everywhere):
            meeting.barrier.abort()

    with pytest.MonkeyPatch.context() as patch:
        for module in ("checkpoint.save", "checkpoint.proof", "dist.together"):
            patch.setattr(f"pentode.{module}.gather_objects", meeting.gather_objects)
        patch.setattr(storage, "os", each)
        with ThreadPoolExecutor(len(systems)) as pool:
            ranks = [pool.submit(rank_main, rank) for rank in range(len(systems))]
            for rank in ranks:
                rank.add_done_callback(note_the_end)
    return [rank.exception() for rank in ranks]
