"""kill -9 at every call of a save and of a prune, and again while the next start tidies up.

The first save of a run is left alone; one rank dies at a call of what comes after it, and all others with it or by
themselves. Then the old checkpoint or the new one is there, whole, and the same command, killed once more at one of
its first calls, in the end gives bit for bit the run that nobody killed. Once the calls are those that go through `os`
in pentode.checkpoint.storage, and once the system's, by strace.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random

from benchmarks.reliability import broken, strace, tiny_run
from benchmarks.reliability.campaign import Campaign, Outcome
from benchmarks.reliability.ranks import GRACE, Ranks
from benchmarks.reliability.watched_os import WatchedOs
from pentode.checkpoint import storage
from pentode.checkpoint.folder import newest, open_checkpoint, steps
from pentode.errors import CheckpointError

STEPS = 9
FIRST = tiny_run.INTERVAL
RECOVERING = 14  # calls of a start, of which one is the second kill


def prepare(prepared: Path) -> None:
    """Run undisturbed, and keep each rank's calls after the first checkpoint is there."""
    config = tiny_run.config_of(prepared, tiny_run.ZERO, steps=STEPS)
    root = prepared / "counted"

    def count(rank: int) -> None:
        file = (prepared / f"calls-{rank}.jsonl").open("w")

        def note(number: int, name: str, half: Callable[[], object]) -> None:
            if (root / str(FIRST)).is_dir():
                file.write(json.dumps([rank, number, name]) + "\n")
                file.flush()

        storage.os = WatchedOs(note, storage.os)

    codes = tiny_run.train(config, root, prepare=count)
    assert codes == [0, 0], tiny_run.printed(root)


def known_calls(prepared: Path) -> list[tuple[int, int, str]]:
    """(rank, number, name) of each call to die at."""
    lines = [line for path in sorted(prepared.glob("calls-*.jsonl")) for line in path.read_text().splitlines()]
    return [tuple(json.loads(line)) for line in lines]


def points(prepared: Path) -> int:
    """Each call, where one rank dies and where all do."""
    return 2 * len(known_calls(prepared))


def case(prepared: Path, folder: Path, number: int, draw: Random) -> Outcome:
    """A rank dies at a call, in the middle of it if it is a write and `draw` says so."""
    rank_hit, number_hit, name = known_calls(prepared)[number // 2]
    torn = draw.random() < 0.5

    def die(rank: int) -> None:
        def watch(number: int, name: str, half: Callable[[], object]) -> None:
            if (rank, number) == (rank_hit, number_hit):
                if torn:
                    half()
                os.kill(os.getpid(), signal.SIGKILL)

        storage.os = WatchedOs(watch, storage.os)

    config = tiny_run.config_of(prepared, tiny_run.ZERO, steps=STEPS)
    run = tiny_run.start(config, folder / "run", prepare=die)
    where = f"call {number_hit} of rank {rank_hit}, {name}"
    return _judged(config, folder / "run", run, rank_hit, where, draw, together=number % 2 == 1)


def prepare_traced(prepared: Path) -> None:
    """Run undisturbed under strace, and keep each rank's system calls."""
    strace.record(tiny_run.config_of(prepared, tiny_run.ZERO, steps=STEPS), prepared)


def traced_points(prepared: Path) -> int:
    """Each system call."""
    return len(strace.later_calls(prepared))


def traced_case(prepared: Path, folder: Path, number: int, draw: Random) -> Outcome:
    """A rank dies at a system call."""
    call, root = strace.later_calls(prepared)[number], folder / "run"
    config = tiny_run.config_of(prepared, tiny_run.ZERO, steps=STEPS)
    run = strace.start(config, root, prepared, call, "signal=SIGKILL")
    together = draw.random() < 0.5
    return _judged(config, root, run, call.rank, str(call), draw, together=together, first=not call.second)


def _judged(
    config: Path,
    root: Path,
    run: Ranks,
    hit: int,
    where: str,
    draw: Random,
    *,
    together: bool,
    first: bool = False,
) -> Outcome:
    """Wait for the death, look at what it left, start twice, compare the end; `first`: it may be in the first save."""
    died = run.wait_for(hit, 60.0) and run.codes[hit] == -signal.SIGKILL
    if together or not run.wait(GRACE):
        run.kill()
    run.close()
    if not died:
        return Outcome("not reached", f"{where}: the rank did not die there: {run.codes}\n{tiny_run.tail(root)}")
    left = "0" if first and tiny_run.last_step(root) < 0 else _whole(root)
    second = draw.randrange(RECOVERING)
    recovering = tiny_run.start(config, root, prepare=lambda rank: _die_at(rank, second))
    killed_again = recovering.wait_for(0, 60.0) and recovering.codes[0] == -signal.SIGKILL
    if not (recovering.wait(0.0 if killed_again else 60.0)):
        recovering.kill()
    recovering.close()
    problem = left if left == "0" or not left.isdigit() else _whole(root)
    if problem.isdigit():
        problem = tiny_run.as_expected(tiny_run.train(config, root), root, config.parent)
    counts = {f"step {left} left": 1, **({"killed again while recovering": 1} if killed_again else {})}
    said = f"{where}{', all ranks' if together else ''}, then at call {second}: {problem}" if problem else ""
    return Outcome("ended as if never killed", said, counts if left.isdigit() else {})


def _die_at(rank: int, number_hit: int) -> None:
    def watch(number: int, name: str, half: Callable[[], object]) -> None:
        if number == number_hit:
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        storage.os = WatchedOs(watch, storage.os)


def _whole(root: Path) -> str:
    """The newest step, if all folders with a number are whole checkpoints; else what is wrong."""
    try:
        for folder in steps(root):
            open_checkpoint(folder).verify()
        found = newest(root)
    except CheckpointError as error:
        return str(error)
    return str(found.step) if found is not None else "no checkpoint is left"


CRASH_POINTS = Campaign(
    "crash-points",
    "kill -9 at every call of a save and prune, once more while recovering: old or new is whole, the end the same",
    prepare,
    case,
    points=points,
    broken=broken.in_place,
)
TRACED = Campaign(
    "crash-points-strace",
    "the same at every system call that a save and prune make, by strace",
    prepare_traced,
    traced_case,
    points=traced_points,
    missing=strace.missing,
)
