"""A disk that refuses: ENOSPC, EDQUOT, EIO or EROFS at every call of a save by two ranks, and in metrics and logs.

A save after the first meets the error, on one of its ranks. All of them must end with code 74 and one line that says
what, where, how much space is needed and free, and what to do; the first checkpoint stays, nothing half-made does, and
the same command then goes on to the state of a run that met no error. With `on_save_error: warn` a run goes on by
itself, unless it was the last save. Metrics and logs may end no run.
"""

import errno
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.reliability import broken, strace, tiny_run
from benchmarks.reliability.campaign import Campaign, Outcome
from benchmarks.reliability.watched_os import WatchedOs
from pentode.checkpoint import storage
from pentode.checkpoint.folder import newest
from pentode.errors import CheckpointError

STEPS = 9  # three checkpoints
FIRST = tiny_run.INTERVAL
CODES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
SPACE = (errno.ENOSPC, errno.EDQUOT)
NEEDS_SPACE = ("mkdir", "open", "write", "fsync")
LINE = re.compile(
    r"pentode: (ranks? [\d, and-]+: )?(/\S+): (.*) \(([\d,]+ bytes are needed, )?([\d,]+|an .*) are free\); "
)
WENT_ON = "earlier checkpoints are as they were; training goes on"  # what is said to on_save_error: warn
SAVES = "Saving checkpoint at"  # from there on it is known how many bytes are needed
NOT_NAMED = "latest.txt: could not be written"  # which nobody reads
NOT_REMOVED = "older checkpoints could not be removed"
NOT_READ_AGAIN = "no older checkpoint is removed"  # said where the newer one could not be read
RECORDS = {
    "metrics.jsonl": "metrics: JsonLines is switched off, training goes on",
    "logs/rank-0.log": "",
}  # what is said
LINES_EACH = 6  # the first so many writes to each of these files meet an error


def prepare(prepared: Path) -> None:
    """Run undisturbed, and keep the calls that each rank makes after the first checkpoint is there."""
    config = tiny_run.write_config(prepared, steps=STEPS)
    root = prepared / "reference"

    def count(rank: int) -> None:
        file = (prepared / f"calls-{rank}.jsonl").open("w")

        def note(number: int, name: str, half: Callable[[], object]) -> None:
            if (root / str(FIRST)).is_dir():
                file.write(json.dumps([rank, number, name]) + "\n")
                file.flush()

        storage.os = WatchedOs(note, storage.os)

    codes = tiny_run.train(config, root, prepare=count)
    assert codes == [0, 0], tiny_run.printed(root)
    (prepared / tiny_run.REFERENCE).write_text(json.dumps(tiny_run.final_state(root)))


def calls(prepared: Path) -> list[tuple[int, int, str]]:
    """(rank, number, name) of each call that can fail."""
    lines = [line for path in sorted(prepared.glob("calls-*.jsonl")) for line in path.read_text().splitlines()]
    return [tuple(json.loads(line)) for line in lines]


def points(prepared: Path) -> int:
    """How many calls times errors there are, and those of metrics and logs."""
    return (len(calls(prepared)) + len(RECORDS) * LINES_EACH) * len(CODES)


def case(prepared: Path, folder: Path, number: int, draw: Random) -> Outcome:
    """One error at one call; every second time a full disk stays full."""
    code, place = CODES[number % len(CODES)], number // len(CODES)
    known = calls(prepared)
    if place < len(known):
        return _storage_case(prepared, folder, known[place], code, draw)
    name, line = divmod(place - len(known), LINES_EACH)
    return _record_case(prepared, folder, list(RECORDS)[name], line, code)


def _storage_case(prepared: Path, folder: Path, call: tuple[int, int, str], code: int, draw: Random) -> Outcome:
    stays = code in SPACE and draw.random() < 0.5
    rank_hit, number_hit, name_hit = call
    root, config = folder / "run", prepared / "tiny.yaml"

    def refuse(rank: int) -> None:
        def watch(number: int, name: str, half: Callable[[], object]) -> None:
            again = stays and number > number_hit and name in NEEDS_SPACE
            if rank == rank_hit and (number == number_hit or again):
                half()
                raise OSError(code, os.strerror(code))

        storage.os = WatchedOs(watch, storage.os)

    policy = draw.choice(("stop", "warn"))
    codes = tiny_run.train(config, root, f"checkpoints.on_save_error={policy}", prepare=refuse)
    where = f"call {number_hit} of rank {rank_hit}, {name_hit}{' and after' if stays else ''}, to {policy}"
    return _judged(config, root, codes, code, where)


def prepare_traced(prepared: Path) -> None:
    """Run undisturbed under strace, and keep each rank's system calls."""
    strace.record(tiny_run.config_of(prepared, tiny_run.ZERO, steps=STEPS), prepared)


def traced_points(prepared: Path) -> int:
    """Each system call with each error."""
    return len(strace.later_calls(prepared)) * len(CODES)


def traced_case(prepared: Path, folder: Path, number: int, draw: Random) -> Outcome:
    """One error at one system call."""
    code, call = CODES[number % len(CODES)], strace.later_calls(prepared)[number // len(CODES)]
    config, root = tiny_run.config_of(prepared, tiny_run.ZERO, steps=STEPS), folder / "run"
    codes = strace.start(config, root, prepared, call, f"error={errno.errorcode[code]}").finish()
    return _judged(config, root, codes, code, str(call), first=not call.second)


def _judged(config: Path, root: Path, codes: list[int], code: int, where: str, *, first: bool = False) -> Outcome:
    """What the ranks said and left, and how the same command then ends; `first`: it may have been the first save."""
    said = tiny_run.printed(root)
    problem = _not_undone(root, first=first) or not_told(codes, said, root, code)
    if not problem:
        problem = tiny_run.as_expected(tiny_run.train(config, root), root, config.parent)
    where = f"{errno.errorcode[code]} at {where}"
    kind = "stopped with exit 74" if codes != [0, 0] else "went on, and said so"
    return Outcome(kind, f"{where}: {problem}\n{tiny_run.tail(root, 4)}" if problem else "", {errno.errorcode[code]: 1})


def _not_undone(root: Path, *, first: bool) -> str:
    """What a failed save left that it should not have, or took; empty if all is as promised."""
    halves = [name for name in tiny_run.leftovers(root) if re.match(r"\.(tmp|old)-\d", name)]
    if halves:
        return f"{', '.join(halves)} was left"
    try:
        found = newest(root)
    except CheckpointError as error:
        return str(error)
    there = first if found is None else found.step >= FIRST
    return "" if there else "the first checkpoint is gone"


def not_told(codes: list[int], said: str, root: Path, code: int) -> str:
    """What the ranks' ends and words lack; empty if nothing."""
    told = [line for line in said.splitlines() if line.startswith("pentode: ")]
    if (
        codes == [0, 0]
        and not told
        and any(words in said for words in (NOT_NAMED, WENT_ON, NOT_REMOVED, NOT_READ_AGAIN))
    ):
        return ""
    if codes != [74, 74]:
        return f"exit codes {codes}, not 74"
    if "Traceback" in said or len(told) != 1:
        return f"not one line but {len(told)}"
    found = LINE.match(told[0])
    cause, remedy = storage.CAUSES[code]
    if (
        found is None
        or not found[2].startswith(str(root))
        or found[3] != cause
        or (SAVES in said and not found[4])
        or remedy not in told[0]
    ):
        return f"its line lacks the path, the cause, bytes needed and free, or what to do: {told[0]}"
    return ""


def _record_case(prepared: Path, folder: Path, name: str, line: int, code: int) -> Outcome:
    """The `line`-th write to a file of metrics or a log, and all after it, fail; the run must not mind."""
    root, config = folder / "run", prepared / "tiny.yaml"
    codes = tiny_run.train(config, root, prepare=lambda rank: _refuse_writes(root / name, line, code))
    problem = ""
    if codes != [0, 0]:
        problem = f"exit codes {codes}"
    elif "Traceback" in tiny_run.printed(root):
        problem = "a traceback"
    elif RECORDS[name] not in tiny_run.printed(root):
        problem = "nothing was said"
    else:
        found = newest(root)
        final = {} if found is None else tiny_run.state_of(found)
        if final != tiny_run.reference(prepared)["files"]:
            problem = "the last checkpoint is another"
    said = f"{errno.errorcode[code]} at write {line} of {name}: {problem}\n{tiny_run.tail(root, 4)}" if problem else ""
    return Outcome("went on without metrics or a log", said, {errno.errorcode[code]: 1})


def _refuse_writes(path: Path, line: int, code: int) -> None:
    """Have this process's writes to `path` fail from the `line`-th on."""
    real = io.open

    def opened(file: Any, *arguments: Any, **named: Any) -> Any:
        found = real(file, *arguments, **named)
        return _Refusing(found, line, code) if str(file) == str(path) else found

    io.open = opened  # what pathlib calls


class _Refusing:
    """A file that takes some writes and then no more."""

    def __init__(self, file: Any, left: int, code: int) -> None:
        self.file, self.left, self.code = file, left, code

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, text: str) -> int:
        if self.left == 0:
            self.file.write(text[: len(text) // 2])
            self.file.flush()
            raise OSError(self.code, os.strerror(self.code))
        self.left -= 1
        return self.file.write(text)


IO_ERRORS = Campaign(
    "io-errors",
    "ENOSPC, EDQUOT, EIO or EROFS at any call of a save: all ranks end with exit 74 and one line, nothing is lost",
    prepare,
    case,
    points=points,
    broken=broken.untidy,
)
TRACED = Campaign(
    "io-errors-strace",
    "the same at every system call of a save, by strace",
    prepare_traced,
    traced_case,
    points=traced_points,
    missing=strace.missing,
)
