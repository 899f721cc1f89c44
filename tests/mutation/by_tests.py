"""Tries one mutant on tests of the project, in a copy of it: for what no layout of layouts.py shows at work.

The tests run as a user runs them, in processes that import the copy's package; a mark tells that they did.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from tests.mutation.files import BY_TESTS, Trial
from tests.mutation.mutants import STAND_INS, Mutant, mutants_of
from tests.mutation.trial import Verdict

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("tests", "pyproject.toml")  # beside the package
MESH, MARK = "dist/mesh.py", ".imported"
LEAST, TIMES = 15.0, 4  # a mutant has so many seconds, and so many times as long as the package as it is took
STUCK, IDLE = 8.0, 80  # seconds in which tests and ranks together compute for fewer ticks: they wait for each other
WIDTH = "300"  # of pytest's lines, which tell why a test failed
LOOK = 0.5  # seconds between two looks at that
PASSED, FAILED, NOT_COLLECTED = 0, 1, 2  # pytest's exit codes

Tried = tuple[Mutant, Trial | None]  # a mutant, and the tests that it is tried on; None: layouts


def everything(package: Path) -> list[Tried]:
    """All mutants of the package in this folder; what tests are to end is tried on no layout."""
    by_tests = [(mutant, one) for one in BY_TESTS for mutant in mutants_of(package, {one.file: one.functions})]
    by_tests.sort(key=lambda tried: (tried[0].path, tried[0].start, -tried[0].stop))
    known = {mutant.key for mutant, _ in by_tests}
    return [*((mutant, None) for mutant in mutants_of(package) if mutant.key not in known), *by_tests]


def complete(folder: Path, trial: Trial, *, slow: bool) -> None:
    """Add the tests to the package in this folder, whose file tells when it is imported."""
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)
        else:
            shutil.copyfile(ROOT / name, folder / name)
    _append(folder / "pentode" / MESH, f"from pentode import {STAND_INS}\n{STAND_INS}.watch(Mesh, slow={slow})\n")
    mark = f"from pathlib import Path as _Path\n\n_Path({str(_mark(folder, trial))!r}).touch()\n"
    _append(folder / "pentode" / trial.file, mark)


def patience_after(seconds: float) -> float:
    """Seconds that a mutant has for tests that took so many."""
    return LEAST + TIMES * seconds


def attempt_by_tests(folder: Path, trial: Trial, patience: float, pipe: Connection, *, watched: bool) -> None:
    """The body of a process: tells what becomes of the project in this folder.

    watched  ends tests that hardly compute; not the first ones, which may wait for a disk to read the libraries from
    """
    os.setsid()  # so that all that the tests start can be ended at once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    options = ["-x", "--tb=line", "-rfE", "-m", "not long and not gpu", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, f"--basetemp={folder / 'made'}", *trial.tests]
    told = folder / "told.txt"
    begun = time.monotonic()
    with told.open("w", encoding="utf-8") as file:  # a pipe would be held open by ranks that hang
        tests = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": WIDTH},
            stdout=file,
            stderr=file,
        )
        code = _exit_code(tests, patience, folder if watched else None)
    verdict = _verdict(code, told.read_text(encoding="utf-8", errors="replace").splitlines(), trial)
    if not _mark(folder, trial).exists():
        verdict = Verdict(trial.tests[0], "astray", f"pentode/{trial.file} was not imported: {verdict.said}")
    pipe.send(Verdict(verdict.layout, verdict.how, verdict.said, time.monotonic() - begun))


def _exit_code(tests: subprocess.Popen[bytes], patience: float, watched: Path | None) -> int | None:
    """How the tests end; None if they do not in time, or if the processes in a folder hardly compute any more."""
    end, before = time.monotonic() + patience, _computed(watched)
    lately: deque[int] = deque(maxlen=int(STUCK / LOOK))
    while time.monotonic() < end:
        with suppress(subprocess.TimeoutExpired):
            return tests.wait(LOOK)
        now = _computed(watched)
        lately.append(sum(ticks - before.get(process, 0) for process, ticks in now.items()))
        before = now
        if now and len(lately) == lately.maxlen and sum(lately) < IDLE:
            return None
    return None


def processes_in(folder: Path) -> list[Path]:
    """Where the system tells of each process that works in this folder; some have a session of their own."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (path / "cwd").readlink().is_relative_to(folder):
                found.append(path)
    return found


def _computed(folder: Path | None) -> dict[Path, int]:
    """Ticks that each process of the tests has computed for; nothing where the system does not tell."""
    found = {}
    for path in processes_in(folder) if folder is not None else ():
        with suppress(OSError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()  # proc(5), from the third field on
            found[path] = int(fields[11]) + int(fields[12])
    return found


def _verdict(code: int | None, lines: Iterable[str], trial: Trial) -> Verdict:
    if code == PASSED:
        return Verdict(None, "lives")
    if code is None:
        return Verdict(trial.tests[0], "hangs")
    said = next((line for line in lines if line.startswith(("FAILED ", "ERROR "))), "".join([*lines][-1:]))
    name, _, why = said.partition(" - ")
    how = {FAILED: "fails", NOT_COLLECTED: "raises"}.get(code, "astray")
    return Verdict(name.partition(" ")[2] or trial.tests[0], how, why[:300])


def _mark(folder: Path, trial: Trial) -> Path:
    return folder / f"{trial.file.replace('/', '.')}{MARK}"


def _append(path: Path, text: str) -> None:
    path.write_text(f"{path.read_text(encoding='utf-8')}\n\n{text}", encoding="utf-8")
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
        compiled.unlink()
