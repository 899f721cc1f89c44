"""Faults by the thousand, and whether each ended as promised: the figures of docs/reliability.md.

usage: python -m benchmarks.reliability [--only NAME ...] [--cases N] [--seed S] [--workers N] [--out FOLDER]

Prints a line for each campaign; `--out` also gets results.jsonl and table.md. A case that went wrong is told with its
number: `--only NAME --seed S --case NUMBER` runs it again alone. Exit code 1 if any did.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.reliability.campaign import Result, conduct, workplace
from benchmarks.reliability.campaigns import CAMPAIGNS


def main() -> int:
    """Run the campaigns that were asked for."""
    asked = _parser().parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, which are forked from a server that is yet to start
    multiprocessing.set_forkserver_preload(["benchmarks.reliability.warm"])
    chosen = [one for one in CAMPAIGNS.values() if not asked.only or one.name in asked.only]
    results: list[Result] = []
    place = Path(tempfile.mkdtemp(prefix="pentode-reliability-", dir=asked.folder or workplace()))
    for campaign in chosen:
        result = conduct(
            campaign,
            place / campaign.name,
            cases=asked.cases,
            control=asked.control,
            seed=asked.seed,
            workers=asked.workers,
            only=asked.case or None,
            tell=lambda text: print(text, file=sys.stderr, flush=True),
        )
        print(result.line(), flush=True)
        results.append(result)
        if asked.out is not None:
            _write(asked.out, result)
    return _end(place, results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=[], choices=sorted(CAMPAIGNS), help="these campaigns", metavar="NAME"
    )
    parser.add_argument("--cases", type=int, help="so many of each campaign; else the long form's number")
    parser.add_argument("--control", type=int, default=40, help="cases of a broken pentode to notice it in; 0: none")
    parser.add_argument("--case", type=int, nargs="+", help="these cases alone, by number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="cases at a time")
    parser.add_argument("--folder", type=Path, help="where runs are made: /dev/shm if there is one, else TMPDIR")
    parser.add_argument("--out", type=Path, help="a folder for results.jsonl and table.md")
    return parser


def _write(out: Path, result: Result) -> None:
    """Add a campaign's figures to what stands in the folder, in both forms."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "results.jsonl").open("a") as file:
        file.write(result.as_json() + "\n")
    table = out / "table.md"
    if not table.exists():
        table.write_text("| campaign | promise | cases | not as promised | what happened |\n|---|---|---|---|---|\n")
    with table.open("a") as file:
        file.write(result.row() + "\n")


def _end(place: Path, results: list[Result]) -> int:
    """Say where folders of failed cases are, or remove all; the exit code."""
    import shutil

    if any(result.problems for result in results):
        print(f"the folders of what went wrong are in {place}", file=sys.stderr)
        return 1
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
