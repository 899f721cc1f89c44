"""Moments of a run that are drawn by chance: while it starts, after some step, in a save."""

import os
from contextlib import suppress
from pathlib import Path
from random import Random

from benchmarks.reliability.ranks import Ranks

SHORTEST, LONGEST = 0.001, 1.0  # seconds after a step, of which one is drawn with even chances for each scale
STARTING = 0.15  # share of the moments that are while a run starts
START = 0.4  # seconds that this takes
SAVING = 0.4  # share of the others that wait for a save


def wait_for_an_instant(run: Ranks, root: Path, draw: Random) -> bool:
    """Wait until a moment that is drawn: in the start, after some step, or in a save; whether the run ended first."""
    if draw.random() < STARTING:
        return run.wait(draw.random() * START)
    if draw.random() < SAVING:
        return saw_a_save(run, root, draw.randrange(4))
    rows = _rows(root)
    while _rows(root) == rows:
        if run.wait(SHORTEST):
            return True
    return run.wait(SHORTEST * (LONGEST / SHORTEST) ** draw.random())


def saw_a_save(run: Ranks, root: Path, skip: int) -> bool:
    """Wait for a save to begin, after `skip` others; whether the run ended first."""
    seen: set[str] = set()
    before = temporary(root)
    while len(seen) <= skip:
        if run.wait(0.0):
            return True
        seen |= temporary(root) - before
    return False


def temporary(root: Path) -> frozenset[str]:
    """Checkpoints that are being made, or that were when their process died."""
    with suppress(FileNotFoundError):
        return frozenset(n for n in os.listdir(root) if n.startswith(".tmp-") and "latest" not in n)
    return frozenset()


def _rows(root: Path) -> int:
    """Bytes of the metrics, which grow with each step."""
    with suppress(FileNotFoundError):
        return os.stat(root / "metrics.jsonl").st_size
    return 0
