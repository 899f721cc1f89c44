"""SIGTERM, SIGUSR1 and SIGINT at random instants: to one rank, all, the launcher, or all of these; once or twice.

What ends so has saved where it stood, once, and says so by its exit code: 75, or 130 for SIGINT. The same command then
ends bit for bit as a run that nobody stopped.
"""

import re
import signal
import time
from collections import Counter
from pathlib import Path
from random import Random

from benchmarks.reliability import broken, launcher, tiny_run
from benchmarks.reliability.campaign import Campaign, Outcome
from benchmarks.reliability.instants import temporary, wait_for_an_instant
from benchmarks.reliability.ranks import Ranks
from pentode.checkpoint.folder import newest
from pentode.errors import CheckpointError

STEPS = 24
CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}
BOTH = "the launcher and all ranks"  # as schedulers do; a terminal's Ctrl-C reaches the launcher alone
TO = {"one rank": 35, "all ranks": 35, "the launcher": 20, BOTH: 10}  # percent
AGAIN = 0.35  # share in which a second signal comes while the state is saved
LONGEST = 60.0  # seconds from the signal to the end that a scheduler grants
PATIENCE = (
    5.0  # seconds that ranks which wait for one that has stopped before it met them have; then launchers end them
)
SOON = 3  # steps within which a run stops: one that is running, one that a rank is ahead, one that was unseen
SAVED = re.compile(r"Saving checkpoint at \S*/(\d+)$", re.MULTILINE)


def nothing(prepared: Path) -> None:
    """Configs and undisturbed runs are made by the first cases that want them."""


def case(prepared: Path, folder: Path, number: int, draw: Random) -> Outcome:
    """One run, stopped once, and gone on with."""
    layout = tiny_run.TWO_RANKS[number // 3 % len(tiny_run.TWO_RANKS)]
    config, root = tiny_run.config_of(prepared, layout, steps=STEPS, tokens__val_check_interval=4), folder / "run"
    to = draw.choices(list(TO), list(TO.values()))[0]
    asked = draw.choice([signal.SIGTERM, signal.SIGUSR1] if to == BOTH else list(CODES))
    run = (tiny_run.launch if "launcher" in to else tiny_run.start)(config, root)
    over = wait_for_an_instant(run, root, draw)
    hit = [draw.randrange(2)] if to == "one rank" else [0, 1]
    _send(run, to, hit, asked)
    began, before, row = time.monotonic(), temporary(root), tiny_run.last_row(root)
    twice = draw.random() < AGAIN and _sent_again(run, root, before, to, hit, asked)
    run.wait(LONGEST if "launcher" in to else PATIENCE)
    seconds = time.monotonic() - began
    waiting = [rank for rank in range(len(run.pids)) if rank not in run.codes]
    run.close()
    left = to == "one rank" and tiny_run.last_row(root) == 0  # by a rank that others would have met at the start
    judged = [rank for rank in run.codes if rank in hit or rank not in waiting] if left else list(run.codes)
    problem = "" if over else _wrong(run, root, asked, judged, waiting, twice=twice)
    if not problem and to in ("one rank", "all ranks") and tiny_run.last_row(root) > row + SOON:
        problem = f"asked after step {row}, it went on to step {tiny_run.last_row(root)}"
    kind = "was over before" if over else "stopped before a step" if left else f"stopped by {asked.name}"
    if not problem:
        problem = tiny_run.as_expected(tiny_run.train(config, root), root, config.parent) or _saved_twice(root, twice)
    said = f"{layout}, {asked.name} to {to}{', twice' if twice else ''}, {run.codes}: {problem}" if problem else ""
    counts = {f"to {to}": 1.0, **({"second signals in a save": 1.0} if twice else {})}
    return Outcome(kind, said, counts, {"seconds until all had ended, at most": 0.0 if waiting else round(seconds, 1)})


def _send(run: Ranks, to: str, hit: list[int], number: signal.Signals) -> None:
    """To ranks, to the launcher, or to all of them at once."""
    if to == BOTH:
        for pid in launcher.ranks_of(run.pids[0]):
            launcher.signal_to(pid, number)
    run.kill([0] if "launcher" in to else hit, number=number)


def _sent_again(
    run: Ranks, root: Path, before: frozenset[str], to: str, hit: list[int], number: signal.Signals
) -> bool:
    """Wait for the save that a signal brings, and send another; whether there was one."""
    while temporary(root) <= before:
        if run.wait(0.0):
            return False
    _send(run, to, hit, number)
    return True


def _wrong(run: Ranks, root: Path, asked: signal.Signals, judged: list[int], waiting: list[int], *, twice: bool) -> str:
    """What is not as promised in how these ranks ended and what they left; empty if all is."""
    if set(waiting) & set(judged):
        return f"ranks {waiting} did not end\n{tiny_run.tail(root)}"
    try:
        newest(root) if root.is_dir() else None
    except CheckpointError as error:
        return str(error)
    if asked == signal.SIGINT and twice:  # a second Ctrl-C does not wait for the save
        return ""
    row, step = tiny_run.last_row(root), max(0, tiny_run.last_step(root))
    for rank in judged:
        if run.codes[rank] == -asked and not (root / "logs" / f"rank-{rank}.log").exists():
            continue  # the signal came before Pentode, which is the system's to answer
        if run.codes[rank] != CODES[asked] and not (run.codes[rank] == 0 and step == STEPS):
            return f"exit code {run.codes[rank]}, not {CODES[asked]}\n{tiny_run.tail(root)}"
    return f"it stopped after step {row}, and saved step {step}" if row != step else ""


def _saved_twice(root: Path, at_once: bool) -> str:
    """Which step was saved more than once, unless a save was broken off."""
    often = [step for step, times in Counter(SAVED.findall(tiny_run.printed(root))).items() if times > 1]
    return f"saved twice: {', '.join(often)}" if often and not at_once else ""


PREEMPTIONS = Campaign(
    "preemptions",
    "SIGTERM, SIGUSR1 or SIGINT at any instant: saved once, exit 75 or 130, and the same command ends bit for bit",
    nothing,
    case,
    cases=50,
    broken=broken.deaf,
)
