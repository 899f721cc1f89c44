"""kill -9 at random instants: one rank, all of them, or the launcher; then the same command, until the run ends.

Its final weights, optimizer state and metrics must be, bit for bit, those of a run that was never killed.
"""

import ctypes
import os
import select
import signal
from contextlib import suppress
from pathlib import Path
from random import Random

from benchmarks.reliability import broken, launcher, tiny_run
from benchmarks.reliability.campaign import Campaign, Outcome
from benchmarks.reliability.instants import temporary, wait_for_an_instant
from benchmarks.reliability.ranks import STUCK, Ranks
from pentode.checkpoint.folder import newest
from pentode.errors import CheckpointError

STEPS = 24
RUNS = 66  # of 3 or 4 kills each, some of which end before the last: 200 and more
PATIENCE = 1.0  # seconds that ranks have to end by themselves when one is killed; launchers wait longer
EVERY = 7  # every so many runs have four
PR_SET_CHILD_SUBREAPER = 36


def nothing(prepared: Path) -> None:
    """Configs and undisturbed runs are made by the first cases that want them."""


def case(prepared: Path, folder: Path, number: int, draw: Random) -> Outcome:
    """One run, killed three or four times."""
    four = number % EVERY == EVERY - 1
    rest = tiny_run.UP_TO_TWO_RANKS
    layout = tiny_run.FOUR_RANKS if four else rest[number // 2 % len(rest)]
    config, root = tiny_run.config_of(prepared, layout, steps=STEPS), folder / "run"
    counts = {f"runs of {layout}": 1.0}
    for _ in range(3 + (number % 3 == 0)):
        before = temporary(root)
        victims = draw.choices(
            ("one rank", "all ranks", "the launcher"), (50, 40, 10 * (tiny_run.world_of(layout) > 1))
        )[0]
        begin = tiny_run.launch if victims == "the launcher" else tiny_run.start
        run = begin(config, root, world=tiny_run.world_of(layout))
        done = wait_for_an_instant(run, root, draw)
        if done:
            break
        there = tiny_run.last_step(root)
        problem = _kill(run, victims, draw)
        in_a_save = bool(temporary(root) - before)
        for name in ("kills", f"kills of {victims}", *(["kills in a save"] if in_a_save else [])):
            counts[name] = counts.get(name, 0) + 1
        problem = problem or _lost(root, there)
        if problem:
            return Outcome("went wrong", f"{layout}, after killing {victims}: {problem}", counts)
    codes = tiny_run.train(config, root, world=tiny_run.world_of(layout))
    problem = tiny_run.as_expected(codes, root, config.parent)
    return Outcome("runs completed", f"{layout}: {problem}" if problem else "", counts)


def _kill(run: Ranks, victims: str, draw: Random) -> str:
    """Kill, and see all processes of the run end; what is wrong with how they do, or nothing."""
    if victims == "the launcher":
        return _kill_launcher(run)
    run.kill([draw.randrange(len(run.pids))] if victims == "one rank" else None)
    if draw.random() < 0.5:
        run.kill(number=signal.SIGTERM)  # as torchrun does with those that are left
    run.wait(PATIENCE)
    run.close()
    return ""


def _kill_launcher(run: Ranks) -> str:
    """Kill the launcher; its ranks, which nobody ends, must end by themselves."""
    _adopt_orphans()
    ranks = launcher.ranks_of(run.pids[0])
    run.kill()
    run.close()
    for pid in ranks:
        with suppress(ProcessLookupError):
            waiting = os.pidfd_open(pid)
            ended = select.select([waiting], [], [], STUCK)[0]
            os.close(waiting)
            if not ended:
                return "a rank without a launcher does not end"
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
    return ""


def _adopt_orphans() -> None:
    """Have the processes that a child of this one leaves behind become this one's children, to be waited for."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _lost(root: Path, there: int) -> str:
    """What a kill took that was there: nothing, if all is well."""
    if not root.is_dir():
        return ""
    try:
        found = newest(root)
    except CheckpointError as error:
        return str(error)
    left = found.step if found is not None else -1
    return f"checkpoint {there} was there, {left} is the newest" if left < there else ""


KILLS = Campaign(
    "kills",
    "kill -9 any rank, all, or the launcher at any instant: the same command ends bit for bit as if never killed",
    nothing,
    case,
    cases=RUNS,
    broken=broken.in_place,
)
