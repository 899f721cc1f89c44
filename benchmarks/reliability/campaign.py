"""What a campaign is: many cases of one kind of fault, each drawn from its number alone, run by several workers.

A case is `draw(seed, number)` and nothing else, so a failing one can be run again by itself. Workers are processes
forked from a server that has imported all of pentode; a case that starts ranks forks them from its worker.
"""

import gc
import json
import multiprocessing
import os
import platform
import random
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.reliability.ranks import Ranks
from pentode.version import VERSION

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    kind     in a word or two, to be counted
    problem  what is not as promised; empty if all is
    counts   what else it adds to the campaign's sums, as the runs that it made
    most     measures of which the campaign's largest is told
    """

    kind: str
    problem: str = ""
    counts: dict[str, float] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Campaign:
    """A kind of fault, and how a case of it is made and judged.

    promise  what each case must show
    cases    how many the long form has; None: as many as `points` finds
    prepare  makes, in an empty folder, what all cases start from; told the seed
    case     (prepared, folder, number, draw) -> how it ended; `folder` is empty and the case's own
    points   of what `prepare` made, how many different cases there are; None: no end of them
    missing  why it cannot run on this machine; empty if it can
    broken   breaks a promise of pentode in the process of a rank, which cases must then notice
    """

    name: str
    promise: str
    prepare: Callable[[Path], object]
    case: Callable[[Path, Path, int, random.Random], Outcome]
    cases: int | None = None
    points: Callable[[Path], int] | None = None
    missing: Callable[[], str] = str
    broken: Callable[[int], object] | None = None


@dataclass
class Result:
    """A campaign's figures."""

    name: str
    promise: str
    seed: int
    cases: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    case_seconds: float = 0.0  # sum over cases
    workers: int = 1
    left_out: str = ""
    control: str = ""

    def add(self, outcome: Outcome, seconds: float) -> None:
        """Count a case."""
        self.cases += 1
        self.case_seconds += seconds
        self.outcomes[outcome.kind] = self.outcomes.get(outcome.kind, 0) + 1
        for name, count in outcome.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        for name, found in outcome.most.items():
            self.most[name] = max(found, self.most.get(name, found))

    def line(self) -> str:
        """The figures on one line, for people."""
        if self.left_out:
            return f"{self.name}: left out, {self.left_out}"
        bad = f"{len(self.problems)} NOT AS PROMISED" if self.problems else "all as promised"
        cost = self.case_seconds / max(1, self.cases)
        control = f"; {self.control}" if self.control else ""
        return (
            f"{self.name}: {self.cases} cases, {bad} ({self.happened()}){control}; {self.seconds:.0f} s with "
            f"{self.workers} workers, {cost:.2f} s a case, seed {self.seed}"
        )

    def happened(self) -> str:
        """How cases ended, and what was counted and measured."""
        found = {**self.outcomes, **self.counts, **self.most}
        return ", ".join(f"{count:g} {name}" for name, count in sorted(found.items()))

    def row(self) -> str:
        """The figures as a line of a table in Markdown."""
        told = (
            f"left out: {self.left_out}" if self.left_out else "; ".join(filter(None, (self.happened(), self.control)))
        )
        return f"| {self.name} | {self.promise} | {self.cases:,} | {len(self.problems)} | {told} |"

    def as_json(self) -> str:
        """The figures as a JSON line, with date, machine and versions."""
        return json.dumps({**asdict(self), **machine()})


def machine() -> dict[str, object]:
    """When and where this is, and with what."""
    import torch

    return {
        "when": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "machine": f"{os.cpu_count()} x {platform.machine()}, {platform.system()} {platform.release()}",
        "versions": {"pentode": VERSION, "torch": torch.__version__, "python": platform.python_version()},
    }


def conduct(
    campaign: Campaign,
    folder: Path,
    *,
    cases: int | None = None,
    control: int = 0,
    seed: int = 0,
    workers: int = 1,
    only: Sequence[int] | None = None,
    tell: Callable[[str], object] = str,
) -> Result:
    """Run a campaign in `folder`: all its cases, the first so many, or the numbers in `only`.

    Of a campaign with points, fewer cases than points are a random choice of them, the seed's. Folders of cases that
    went wrong are kept. `tell` is called with each problem when it is found. Then up to `control` cases run with a
    pentode that is broken on purpose, of which one must go wrong: else the campaign proves nothing.
    """
    result = Result(campaign.name, campaign.promise, seed, workers=workers, left_out=campaign.missing())
    if result.left_out:
        return result
    began = time.monotonic()
    prepared = folder / "prepared"
    prepared.mkdir(parents=True)
    with _workers(workers) as pool:
        pool.submit(_prepare, campaign, prepared).result()
        numbers = list(only) if only is not None else _numbers(campaign, prepared, cases, seed)
        for number, outcome, seconds in _outcomes(pool, campaign, folder, numbers, seed):
            result.add(outcome, seconds)
            if outcome.problem:
                result.problems.append(f"{campaign.name}: case {number} of seed {seed}: {outcome.problem}")
                tell(result.problems[-1])
    if control and campaign.broken is not None and only is None:
        numbers = _numbers(campaign, prepared, control, seed + 1)
        noticed = None
        with _workers(workers, campaign.broken) as pool:
            for done in range(0, len(numbers), workers):  # few at a time: the first to notice is enough
                some = _outcomes(pool, campaign, folder / "broken", numbers[done : done + workers], seed + 1)
                if any(outcome.problem for _, outcome, _ in some):
                    noticed = done + workers
                    break
        what = campaign.broken.__doc__.splitlines()[0]
        result.control = f"{noticed} cases noticed when {what}" if noticed else ""
        if not noticed:
            result.problems.append(f"{campaign.name}: {len(numbers)} cases did not notice when {what}")
            tell(result.problems[-1])
    result.seconds = time.monotonic() - began
    return result


def _workers(count: int, broken: Callable[[int], object] | None = None) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(count, mp_context=context, initializer=_settle, initargs=(broken,))


def _outcomes(
    pool: ProcessPoolExecutor, campaign: Campaign, folder: Path, numbers: Sequence[int], seed: int
) -> Iterator[tuple[int, Outcome, float]]:
    """Each case's number, how it ended, and its seconds, as they end."""
    prepared = folder.parent / "prepared" if folder.name == "broken" else folder / "prepared"
    folder.mkdir(exist_ok=True)
    work = {pool.submit(_one, campaign, prepared, folder / f"case-{n}", n, seed): n for n in numbers}
    for future in as_completed(work):
        yield work[future], *future.result()


def workplace() -> Path:
    """A folder to make folders of cases in: memory where there is some, so that no disk's speed is measured."""
    return SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))


def _numbers(campaign: Campaign, prepared: Path, cases: int | None, seed: int) -> list[int]:
    points = campaign.points(prepared) if campaign.points is not None else None
    wanted = cases if cases is not None else campaign.cases if points is None else points
    assert wanted is not None, f"{campaign.name} does not say how many cases it has"
    if points is None:
        return list(range(wanted))
    return sorted(random.Random(seed).sample(range(points), min(wanted, points)))


def _prepare(campaign: Campaign, prepared: Path) -> None:
    campaign.prepare(prepared)


def _one(campaign: Campaign, prepared: Path, folder: Path, number: int, seed: int) -> tuple[Outcome, float]:
    """A case, in a worker; its folder is gone afterwards if all went well."""
    began = time.monotonic()
    folder.mkdir()
    try:
        outcome = campaign.case(prepared, folder, number, random.Random(f"{campaign.name} {seed} {number}"))
    except Exception:  # noqa: BLE001
        outcome = Outcome("broke", traceback.format_exc())
    if not outcome.problem:
        shutil.rmtree(folder)
    return outcome, time.monotonic() - began


def _settle(broken: Callable[[int], object] | None) -> None:
    """Begin a worker: what is imported is left out of collections, so that forked processes share its memory."""
    import torch

    torch.set_num_threads(1)
    gc.freeze()
    if broken is not None:
        Ranks.everywhere.append(broken)
