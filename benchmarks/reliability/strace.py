"""System calls of a run's ranks, watched and injected by strace, which attaches to them before they begin.

No stand-in for `os` is needed, so what a library or another thread does is seen, too.
"""

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.reliability import tiny_run
from benchmarks.reliability.ranks import Ranks

CALLS = "mkdir,openat,write,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,ftruncate"
LINE = re.compile(r"(\d+) +(\w+)\((?:\d+<([^>]*)>|(?:AT_FDCWD[^,]*, )?\"([^\"]*)\")")
IN_A_RUN = re.compile(r"/(\.(tmp|old|trash|bad)-|\d+(/|$))|$")  # what follows the run's folder in paths that count
SAME_HEX = "0badcafe"


@dataclass(frozen=True)
class Call:
    """The `when`-th call of that name by one thread of a rank, among those of a run's checkpoints; its path there."""

    rank: int
    name: str
    when: int
    path: str
    creates: bool = False


@cache
def missing() -> str:
    """Why strace cannot be used here; empty if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False)
    return "strace may not trace here" if tried.returncode else ""


def same_names(rank: int) -> None:
    """Have a rank's temporary folders get the same name in every run, so that strace can be told of them."""
    import secrets

    secrets.token_hex = lambda count=4: SAME_HEX[: 2 * count]


def record(config: Path, folder: Path) -> None:
    """Run undisturbed in `folder`/run, and keep the system calls of each rank in `folder`/calls-<rank>.txt."""
    root = folder / "run"
    codes = tiny_run.train(config, root, prepare=same_names, attach=lambda pids: watch(pids, folder))
    assert codes == [0, 0], tiny_run.printed(root)


def watch(pids: list[int], folder: Path) -> None:
    """Attach to all ranks; what each one calls goes to `folder`/calls-<rank>.txt."""
    for rank, pid in enumerate(pids):
        _attach(pid, ["-y", "-s", "0", "-e", f"trace={CALLS}", "-o", str(folder / f"calls-{rank}.txt")])


@cache
def calls(folder: Path) -> list[Call]:
    """What ranks did in the run's folder to checkpoints, by what `record` kept; in order for each rank."""
    root, found = f"{folder / 'run'}", []
    for path in sorted(folder.glob("calls-*.txt")):
        rank, counts = int(path.stem.partition("-")[2]), Counter()
        for line in path.read_text(errors="replace").splitlines():
            read = LINE.match(line)
            place = (read[3] or read[4] or "") if read else ""
            if read and place.startswith(root) and IN_A_RUN.match(place[len(root) :]):
                counts[read[1], read[2]] += 1
                made = read[2] == "openat" and "O_CREAT" in line
                found.append(Call(rank, read[2], counts[read[1], read[2]], place[len(root) :], made))
    return found


def later_calls(folder: Path) -> list[Call]:
    """Those of each rank from the first of the second save on."""
    found: list[Call] = []
    begun: set[int] = set()
    for call in calls(folder):
        if f"/.tmp-{2 * tiny_run.INTERVAL}-" in call.path:
            begun.add(call.rank)
        if call.rank in begun:
            found.append(call)
    return found


def start(config: Path, root: Path, folder: Path, call: Call, what: str) -> Ranks:
    """Start the run that `record` recorded, and do `what` ("signal=SIGKILL", "error=EIO") at one of its calls."""
    paths = sorted({f"{root}{seen.path}" for seen in calls(folder)})
    options = [option for path in paths for option in ("-P", path)]
    options += ["-o", "/dev/null", "-e", f"inject={call.name}:{what}:when={call.when}"]
    return tiny_run.start(config, root, prepare=same_names, attach=lambda pids: _attach(pids[call.rank], options))


def _attach(pid: int, options: list[str]) -> None:
    """Start strace on a process, and return when it holds it; it ends with the process."""
    tracer = subprocess.Popen(["strace", "-f", "-q", "-p", str(pid), *options], stderr=subprocess.PIPE, text=True)
    status = Path(f"/proc/{pid}/status")
    while "TracerPid:\t0\n" in status.read_text():
        if tracer.poll() is not None:
            raise RuntimeError(f"strace ended: {tracer.communicate()[1]}")
