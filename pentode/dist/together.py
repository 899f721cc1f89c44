"""Work that succeeds on all ranks or fails on all: what one of them meets, every one raises, and one of them tells.

A rank that left alone would leave the others waiting in their next collective. The work itself must not communicate.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from pentode.dist.collectives import gather_objects
from pentode.dist.mesh import Axis
from pentode.errors import Interrupted, PentodeError, Preempted, RankError, on_all_ranks

T = TypeVar("T")
MEET_EVERY = 10.0  # seconds; far less than a collective waits


def together(work: Callable[[], T], world: Axis) -> T:
    """Do the work on every rank, and return what it gave here; all ranks of `world` must call.

    Where it failed, all raise the error of the lowest rank that has one, with the ranks whom it befell.
    """
    return _done(work, world, asked=range(world.size))[0]


def on_first(work: Callable[[], T], world: Axis) -> T | None:
    """Do the work on the first rank while the others wait; None on those. All raise what it raised."""
    found = _done(work, world, asked=range(1))
    return found[0] if found else None


def together_at_length(work: Callable[[], T], world: Axis, *, meet_every: float = MEET_EVERY) -> T:
    """`together` for work that may take hours, on one rank more than on another; see `on_first_at_length`."""
    if world.size == 1:
        return work()
    return together(_at_length(work, world, asked=range(world.size), meet_every=meet_every), world)


def on_first_at_length(work: Callable[[], T], world: Axis, *, meet_every: float = MEET_EVERY) -> T | None:
    """`on_first` for work that may take hours: the others, who would not wait so long, hear of it every few seconds.

    The work is done in a thread of its own, so that a signal ends the waiting; what it returns must be small.
    """
    return on_first(_at_length(work, world, asked=range(1), meet_every=meet_every), world)


def in_turn(work: Callable[[], T], world: Axis) -> T:
    """`together`, but first on the first rank alone, which prepares and keeps what the others then only read."""
    return (_done(work, world, asked=range(1)) + _done(work, world, asked=range(1, world.size)))[0]


def tell_once(error: PentodeError, *, rank: int, wait_for_all: Callable[[], None]) -> None:
    """Print on the first rank what all of them raise, before any of them leaves: launchers then end the others."""
    if rank == 0:
        print(error.printed, file=sys.stderr, flush=True)
    wait_for_all()
    error.told = True


def ranks_in_words(numbers: Sequence[int]) -> str:
    """Rising numbers as `rank 1`, `ranks 0, 2 and 3`, `ranks 0 and 2-7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words: list[str] = []
    for run in runs:
        words += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
    *some, last = words
    return f"ranks {', '.join(some)} and {last}" if some else f"rank{'s' * (len(numbers) > 1)} {last}"


def _at_length(work: Callable[[], T], world: Axis, *, asked: range, meet_every: float) -> Callable[[], T]:
    """Have the ranks that are `asked` do it, and return on all when it is done; to call is to get what came of it."""
    found: Future[T] = Future()

    def do() -> None:
        try:
            found.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised on all ranks
            found.set_exception(error)

    thread = threading.Thread(target=do, name="at-length", daemon=True)
    if world.rank in asked:
        thread.start()
    working = True
    while working:
        if world.rank in asked:
            thread.join(meet_every)
        working = any(gather_objects(thread.is_alive(), world))
    return found.result


def _done(work: Callable[[], T], world: Axis, *, asked: range) -> list[T]:
    """What the work gave, if this rank is one of those `asked`; where it failed on one of them, all raise."""
    found: list[T] = []
    failure = cause = None
    try:
        if world.rank in asked:
            found.append(work())
    except (Preempted, Interrupted):
        raise  # by a signal, which may have come to all, wherever each of them stands
    except Exception as error:
        if world.size == 1:
            raise
        failure, cause = error if isinstance(error, PentodeError) else RankError.of(error), error
    failures = gather_objects(failure, world)
    first = next((one for one in failures if one is not None), None)
    if first is not None:
        ranks = [rank for rank, one in enumerate(failures) if one is not None and str(one) == str(first)]
        obvious = asked.start == 0 and len(ranks) == len(asked)
        raise on_all_ranks(first if obvious else first.said_of(ranks_in_words(ranks))) from cause
    return found
