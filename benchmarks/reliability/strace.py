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
PATH = re.compile(r"[<\"](/[^>\"]*)[>\"]")
IN_A_RUN = re.compile(r"/(\.(tmp|old|trash|bad)-|\d+(/|$))|$")  # what follows the run's folder in paths that count
SECOND = 2 * tiny_run.INTERVAL
# Paths of the second save, and of what it prunes.
OF_SECOND = re.compile(rf"/(\.tmp-{SECOND}-|{SECOND}(/|$)|{tiny_run.INTERVAL}$|\.trash-)")
OF_EVERY = re.compile(r"(/\.tmp-latest-.*)?$")  # and of what every save touches: the run's folder, latest.txt
SAME_HEX = "0badcafe"


@dataclass(frozen=True)
class Call:
    """A system call of a rank: the `when`-th of that name by one thread, among those like it.

    path     what it is about, from the run's folder on
    creates  it makes a file
    second   it is about the second save alone; else about what every save writes to, as the run's folder: then strace,
             which counts for each thread, and a save may have a thread of its own, finds it in the first
    """

    rank: int
    name: str
    when: int
    path: str
    creates: bool
    second: bool


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
                inside = place[len(root) :]
                second, every = OF_SECOND.match(inside) is not None, OF_EVERY.match(inside) is not None
                like = read[1], read[2], second, every  # what strace counts together: it looks at the first path alone
                counts[like] += 1
                creates = read[2] == "openat" and "O_CREAT" in line
                found.append(Call(rank, read[2], counts[like], inside, creates, second))
    return found


def later_calls(folder: Path) -> list[Call]:
    """Those of the second save, and one of each kind of those that every save makes."""
    every = {
        (call.rank, call.name, call.path): call for call in calls(folder) if _of_every_save(call) and call.when < 3
    }
    return [call for call in calls(folder) if call.second] + list(every.values())


def start(config: Path, root: Path, folder: Path, call: Call, what: str) -> Ranks:
    """Start the run that `record` recorded, and do `what` ("signal=SIGKILL", "error=EIO") at one of its calls."""
    seen = {one for path in folder.glob("calls-*.txt") for one in _inside(str(folder / "run"), path.read_text())}
    alike = OF_SECOND.match if call.second else OF_EVERY.match
    options = [option for one in sorted(filter(alike, seen)) for option in ("-P", f"{root}{one}")]
    options += ["-o", "/dev/null", "-e", f"inject={call.name}:{what}:when={call.when}"]
    return tiny_run.start(config, root, prepare=same_names, attach=lambda pids: _attach(pids[call.rank], options))


def _of_every_save(call: Call) -> bool:
    return not call.second and call.name != "mkdir" and OF_EVERY.match(call.path) is not None  # the run's own is there


def _inside(root: str, text: str) -> set[str]:
    """The paths in strace's words that are the run's folder or lie in it, from there on."""
    return {one[len(root) :] for one in PATH.findall(text) if one == root or one.startswith(f"{root}/")}


def _attach(pid: int, options: list[str]) -> None:
    """Start strace on a process, and return when it holds it; it ends with the process."""
    tracer = subprocess.Popen(["strace", "-f", "-q", "-p", str(pid), *options], stderr=subprocess.PIPE, text=True)
    status = Path(f"/proc/{pid}/status")
    while "TracerPid:\t0\n" in status.read_text():
        if tracer.poll() is not None:
            raise RuntimeError(f"strace ended: {tracer.communicate()[1]}")
