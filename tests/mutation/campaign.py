"""Tries all mutants of the package, many at a time, on layouts or on tests (files.py), and tells which live.

    make test-mutations ARGS="--workers 16 --out FOLDER"

Into the folder go mutants.jsonl, a line for each while it runs, and in the end survivors.md. Exits with 1 if one lives
that the table in survivors.py lacks, or if the table has one that does not live.
"""

import argparse
import compileall
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks are forked and stay on the CPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; threads would be lost in forks

import torch

from tests.mutation.by_tests import Tried, attempt_by_tests, complete, everything, patience_after, processes_in
from tests.mutation.files import Trial
from tests.mutation.mutants import STAND_INS, Mutant
from tests.mutation.survivors import reason_for, unneeded
from tests.mutation.trial import FORK, Orders, Verdict, attempt, expect

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0  # seconds that the ranks of a layout have; on an idle machine they take one or two
STARTING = 60.0  # seconds more that a mutant has in all
NEWS = 15.0  # seconds between lines of progress


@dataclass
class _Running:
    mutant: Mutant | None  # None: the package as it is
    trial: Trial | None
    process: BaseProcess
    folder: Path
    end: float


class Campaign:
    """Runs mutants' processes, `workers` at a time; on layouts first on those that ended others of the same file.

    layouts  how many of them; 0: all mutants are for tests
    """

    def __init__(self, place: Path, *, workers: int, layouts: int | None = None, patience: float = PATIENCE) -> None:
        self.place, self.workers, self.patience = place, workers, patience
        self.original, self.expected = place / "original", place / "expected"
        shutil.copytree(ROOT / "pentode", self.original / "pentode")
        shutil.copyfile(Path(__file__).with_name(f"{STAND_INS}.py"), self.original / "pentode" / f"{STAND_INS}.py")
        compileall.compile_dir(self.original, quiet=1)  # once for all mutants, which change one file each
        self.expected.mkdir()
        self.layouts = 0 if layouts == 0 else self._expect(layouts)
        self.ended: defaultdict[str, Counter[int | str]] = defaultdict(Counter)
        self.took: dict[Trial, float] = {}  # seconds, with the package as it is

    def _expect(self, layouts: int | None) -> int:
        """Find what one process makes of the problems, and import what that took, so that mutants' processes need not.

        Returns how many layouts there are.
        """
        pipes, processes = [], []
        for number in range(self.workers):
            here, there = FORK.Pipe(duplex=False)
            options = {"layouts": layouts, "share": (number, self.workers), "pipe": there}
            process = FORK.Process(target=expect, args=(self.original, self.expected), kwargs=options, daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        found = [pipe.recv() for pipe in pipes]
        if failures := [said for said in found if isinstance(said, str)]:
            raise RuntimeError(f"mutation: one process, with the package as it is: {failures[0]}")
        for process in processes:
            process.join()
        for name in dict.fromkeys(name for _, names in found for name in names):
            with suppress(Exception):
                importlib.import_module(name)
        threads = threading.active_count()
        assert threads == 1, f"{threads} threads; those besides the first would be lost in forks"
        return found[0][0]

    def run(self, mutants: Sequence[Tried]) -> Iterator[tuple[Mutant, Verdict]]:
        """Each mutant and what became of it, as it becomes known. The package as it is goes first, and must live."""
        kinds = dict.fromkeys(trial for _, trial in mutants)
        queue = [*reversed(mutants), *((None, trial) for trial in kinds)]
        running: dict[Connection, _Running] = {}
        try:
            while queue or running:
                while queue and len(running) < self.workers:
                    pipe, one = self._start(*queue.pop())
                    running[pipe] = one
                ready = wait(list(running), timeout=1.0)
                late = [pipe for pipe, one in running.items() if time.monotonic() > one.end and pipe not in ready]
                for pipe in [*ready, *late]:
                    assert isinstance(pipe, Connection)
                    one = running.pop(pipe)
                    verdict = self._verdict(pipe) if pipe in ready else Verdict(0, "hangs", "in all")
                    _end(one)
                    if (one.mutant is None and verdict.layout is not None) or verdict.how == "astray":
                        raise RuntimeError(f"mutation: the package as it is {verdict.how}: {verdict}")
                    if one.mutant is not None:
                        self.ended[one.mutant.path][-1 if verdict.layout is None else verdict.layout] += 1
                        yield one.mutant, verdict
                    elif one.trial is not None:
                        self.took[one.trial] = verdict.seconds
        finally:
            for one in running.values():
                _end(one)

    def _start(self, mutant: Mutant | None, trial: Trial | None) -> tuple[Connection, _Running]:
        folder = Path(tempfile.mkdtemp(dir=self.place)).resolve()
        shutil.copytree(self.original, folder, dirs_exist_ok=True)
        if mutant is not None:
            path = folder / mutant.path
            path.write_text(mutant.of(path.read_text(encoding="utf-8")), encoding="utf-8")
            for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
                compiled.unlink()
        here, there = FORK.Pipe(duplex=False)
        if trial is not None:
            complete(folder, trial, slow=mutant is not None and mutant.slow)
            patience = patience_after(self.took[trial]) if trial in self.took else 2 * self.patience
            options = {"watched": mutant is not None}
            process = FORK.Process(target=attempt_by_tests, args=(folder, trial, patience, there), kwargs=options)
        else:
            patience = self.patience * self.layouts
            process = FORK.Process(target=attempt, args=(folder, self._orders(mutant), there))
        process.start()
        there.close()
        return here, _Running(mutant, trial, process, folder, time.monotonic() + STARTING + patience)

    def _orders(self, mutant: Mutant | None) -> Orders:
        order, module, slow = list(range(self.layouts)), None, False
        if mutant is not None:
            order.sort(key=lambda number: -self.ended[mutant.path][number])
            module, slow = mutant.path.removesuffix(".py").replace("/", "."), mutant.slow
        return Orders(order, self.expected, self.patience, module=module, slow=slow)

    def _verdict(self, pipe: Connection) -> Verdict:
        try:
            return pipe.recv()
        except EOFError:
            return Verdict(0, "raises", "the process has ended")


def _end(one: _Running) -> None:
    """End a mutant's process and its ranks."""
    assert one.process.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(one.process.pid, signal.SIGKILL)
    for process in processes_in(one.folder):
        with suppress(ProcessLookupError):
            os.kill(int(process.name), signal.SIGKILL)
    one.process.kill()
    one.process.join()
    shutil.rmtree(one.folder, ignore_errors=True)


def chosen(mutants: Sequence[Tried], options: argparse.Namespace) -> list[Tried]:
    """What the options ask for; those that will live, and take longest, first."""
    found = [tried for tried in mutants if not options.only or any(text in tried[0].name for text in options.only)]
    number, of = map(int, options.shard.split("/"))
    found = found[number - 1 :: of]
    if options.sample is not None:
        found = random.Random(options.seed).sample(found, min(options.sample, len(found)))
    return sorted(found, key=lambda tried: reason_for(tried[0].key) is None)


def report(tried: Sequence[tuple[Mutant, Verdict]], *, whole: bool) -> tuple[str, bool]:
    """What is to be known in the end, as Markdown, and whether it is as the table says."""
    living = [mutant for mutant, verdict in tried if verdict.layout is None]
    unexplained = [mutant for mutant in living if reason_for(mutant.key) is None]
    superfluous = unneeded(tried=[m.key for m, _ in tried], living=[m.key for m in living], whole=whole)
    counts = Counter(verdict.how for _, verdict in tried)
    lines = [f"{len(tried)} mutants: " + ", ".join(f"{how} {count}" for how, count in counts.most_common())]
    if unexplained:
        lines += ["", "Live, and nobody has said why that is harmless:", ""]
        lines += [f"- `{mutant.name}`\n  `{mutant.replacement}`" for mutant in unexplained]
    if superfluous:
        lines += ["", "In the table, but none lives:", "", *(f"- `{pattern}`" for pattern in superfluous)]
    explained = [mutant for mutant in living if mutant not in unexplained]
    if explained:
        lines += ["", "Live, harmlessly:", ""]
        lines += [f"- `{mutant.name}`\n  {reason_for(mutant.key)}" for mutant in explained]
    return "\n".join(lines) + "\n", not unexplained and not superfluous


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.campaign", description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="those whose names have this; or this"
    )
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="every Nth mutant, from the Ith")
    parser.add_argument("--sample", type=int, metavar="K", help="only K of them, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", type=int, metavar="N", help="try them on the first N layouts only")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds that a layout may take")
    parser.add_argument("--out", type=Path, help="a folder for mutants.jsonl and survivors.md")
    parser.add_argument("--list", action="store_true", help="name the mutants, and try none")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    options = parsed(arguments)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and ends mutants' processes
    possible = everything(ROOT / "pentode")
    mutants = chosen(possible, options)
    if options.list:
        print("\n".join(f"{mutant.name}\n    {mutant.replacement}" for mutant, _ in mutants))
        return 0
    out = options.out if options.out is not None else Path(tempfile.mkdtemp(prefix="mutants-"))
    out.mkdir(parents=True, exist_ok=True)
    begun = news = time.monotonic()
    tried: list[tuple[Mutant, Verdict]] = []
    with tempfile.TemporaryDirectory() as place, (out / "mutants.jsonl").open("w", encoding="utf-8") as file:
        layouts = options.layouts if any(trial is None for _, trial in mutants) else 0
        campaign = Campaign(Path(place).resolve(), workers=options.workers, layouts=layouts, patience=options.patience)
        print(
            f"{len(mutants)} mutants, {campaign.layouts} layouts; ready after {time.monotonic() - begun:.0f} s",
            flush=True,
        )
        for mutant, verdict in campaign.run(mutants):
            tried.append((mutant, verdict))
            file.write(json.dumps({"name": mutant.name, "replacement": mutant.replacement, **asdict(verdict)}) + "\n")
            file.flush()
            if verdict.layout is None or len(mutants) <= 20 or time.monotonic() > news + NEWS:
                news = time.monotonic()
                print(f"{len(tried)}/{len(mutants)} {news - begun:.0f} s  {verdict.how}: {mutant.name}", flush=True)
    text, good = report(tried, whole=len(mutants) == len(possible))
    (out / "survivors.md").write_text(text, encoding="utf-8")
    print(f"{text}{time.monotonic() - begun:.0f} s; in {out}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
