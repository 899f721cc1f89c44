"""System calls of a run's ranks, watched and injected by strace, which attaches to them before they begin.

No stand-in for `os` is needed, so what a library or another thread does is seen, too.
"""

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CALLS = "mkdir,openat,write,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,ftruncate"
LINE = re.compile(r"(\d+) +(\w+)\((?:\d+<([^>]*)>|(?:AT_FDCWD[^,]*, )?\"([^\"]*)\")")
IN_A_RUN = re.compile(r"/(\.(tmp|old|trash|bad)-|\d+(/|$))|$")  # what follows the run's folder in paths that count
SAME_HEX = "0badcafe"


@dataclass(frozen=True)
class Call:
    """The `when`-th call of that name by one thread of a rank, among those of the paths that are watched."""

    rank: int
    name: str
    when: int
    path: str


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


def watch(pids: Sequence[int], folder: Path) -> None:
    """Attach to all ranks; each one's calls go to `folder`/calls-<rank>.txt."""
    for rank, pid in enumerate(pids):
        _attach(pid, ["-y", "-s", "0", "-e", f"trace={CALLS}", "-o", str(folder / f"calls-{rank}.txt")])


def inject(pid: int, call: Call, paths: Sequence[str], what: str) -> None:
    """Attach to one rank, and do `what` ("signal=SIGKILL", "error=EIO") at one call, counted among those of `paths`."""
    options = [option for path in paths for option in ("-P", path)]
    _attach(pid, [*options, "-o", "/dev/null", "-e", f"inject={call.name}:{what}:when={call.when}"])


def calls(folder: Path, root: Path) -> Iterator[Call]:
    """What ranks did in a run's folder to checkpoints, by what `watch` left; in order for each rank."""
    for path in sorted(folder.glob("calls-*.txt")):
        rank, counts = int(path.stem.partition("-")[2]), Counter()
        for line in path.read_text(errors="replace").splitlines():
            found = LINE.match(line)
            place = (found[3] or found[4] or "") if found else ""
            if found and place.startswith(str(root)) and IN_A_RUN.match(place[len(str(root)) :]):
                counts[found[1], found[2]] += 1
                yield Call(rank, found[2], counts[found[1], found[2]], place)


def _attach(pid: int, options: list[str]) -> None:
    """Start strace on a process, and return when it holds it; it ends with the process."""
    tracer = subprocess.Popen(["strace", "-f", "-q", "-p", str(pid), *options], stderr=subprocess.PIPE, text=True)
    status = Path(f"/proc/{pid}/status")
    while "TracerPid:\t0\n" in status.read_text():
        if tracer.poll() is not None:
            raise RuntimeError(f"strace ended: {tracer.communicate()[1]}")
