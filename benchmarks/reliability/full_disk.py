"""A disk that is really full: a file system of 16 MiB in memory, filled to one of 20 levels before a run begins.

Every second run asks for room first, and is refused; in the others checkpoints, metrics and logs meet the end of it.
They end well or with exit 74 and one line; with space again, the same command ends as a run that always had it.
"""

import errno
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random

from benchmarks.reliability import tiny_run
from benchmarks.reliability.campaign import Campaign, Outcome
from benchmarks.reliability.io_errors import not_told
from pentode.checkpoint.folder import newest
from pentode.errors import CheckpointError

STEPS = 9
SIZE = 16 * 2**20  # bytes
LEVELS = 20
LEAST, MOST = 16 * 2**10, 6 * 2**20  # bytes that are left free; a checkpoint takes 1.2 MB, and there are three
BEFORE = "must fit at a time, but"  # is said where a run is refused because the disk has too little room
WIDE = {"model__model_config__n_embd": 64}


@cache
def missing() -> str:
    """Why no file system can be made here; empty if one can."""
    with tempfile.TemporaryDirectory() as folder:
        tried = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", folder], capture_output=True, check=False
        )
        if tried.returncode:
            return "no file system may be mounted here"
        subprocess.run(["umount", folder], check=True)
    return ""


@contextmanager
def small(root: Path, *, left: int) -> Iterator[Path]:
    """A file system of its own at a run's folder, with so many bytes free, and the file that takes the others."""
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(root)], check=True)
    try:
        with (root / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, SIZE - left)
        yield root / "filler"
    finally:
        subprocess.run(["umount", str(root)], check=True)


def prepare(prepared: Path) -> None:
    """Run with all the space that it wants."""
    tiny_run.config_of(prepared, tiny_run.ZERO, steps=STEPS, **WIDE)


def case(prepared: Path, folder: Path, number: int, draw: Random) -> Outcome:
    """One level: the run, and then the rest of it with space."""
    config = tiny_run.config_of(prepared, tiny_run.ZERO, steps=STEPS, **WIDE)
    root, left = folder / "run", LEAST + (MOST - LEAST) * (number // 2) // (LEVELS - 1)
    asked = "true" if number % 2 else "false"
    with small(root, left=left) as filler:
        codes = tiny_run.train(config, root, f"checkpoints.check_free_space={asked}")
        problem = "" if codes == [0, 0] else _wrong(codes, tiny_run.printed(root), root)
        filler.unlink()
        if not problem:
            again = tiny_run.train(config, root)
            problem = "" if again == [0, 0] else f"with space the run ended with {again}"
        found = None if problem else newest(root)
        if found is not None and tiny_run.state_of(found) != tiny_run.reference(config.parent)["files"]:
            problem = "the last checkpoint is another"
    refused = codes != [0, 0] and BEFORE in tiny_run.printed(root)
    kind = "had space enough" if codes == [0, 0] else "refused at the start" if refused else "stopped with exit 74"
    return Outcome(kind, f"{left:,} bytes free: {problem}\n{tiny_run.tail(root)}" if problem else "")


def _wrong(codes: list[int], said: str, root: Path) -> str:
    """What is not as promised where there was too little space; empty if all is."""
    halves = [name for name in tiny_run.leftovers(root) if re.match(r"\.(tmp|old)-\d", name)]
    if halves:
        return f"{', '.join(halves)} was left"
    try:
        newest(root)
    except CheckpointError as error:
        return str(error)
    if codes == [74, 74] and BEFORE in said and "Traceback" not in said:
        return ""
    return not_told(codes, said, root, errno.ENOSPC)


FULL_DISK = Campaign(
    "full-disk",
    "a file system filled to one of 20 levels: exit 74 and one line, or enough; with space again, the end is the same",
    prepare,
    case,
    cases=2 * LEVELS,
    missing=missing,
)
