"""Tries one mutant on layouts: in a process of its own, which imports the mutated package, and forks each one's ranks.

Nothing of the package is imported here before that.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from tests.mutation.mutants import STAND_INS

PAUSE = 0.01  # seconds by which slow messages are late
LONG_PAUSE = 0.05  # by which weights are late, whose messages are few, with whole blocks computed between their uses
SENDS = ("batch_isend_irecv",)
SUMS = (
    "all_reduce",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
)  # late on all ranks but the first: it has to wait
JOINS = ("all_gather_into_tensor", "all_gather_single")  # late on the first, which always has a part of what is joined

STUCK = 5.0  # seconds in which not one rank computes anything: then they wait for each other
LOOKS = 10  # at a rank, in that time
IDLE = 1e-4  # seconds of computing that are nothing

COMPARE = ("assert_equal", "assert_written_alike", "whole")  # functions that say whether a rank's numbers are right

FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: the layout, or the test, that ended it (None: it lives), how, and what was said."""

    layout: int | str | None
    how: str
    said: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Orders:
    """What to try a package on: layouts by number, in this order.

    expected  the folder of what one process makes of each problem
    patience  seconds that the ranks of a layout have
    module    the one that is written wrongly, if any is
    slow      whether messages are slow
    """

    layouts: Sequence[int]
    expected: Path
    patience: float
    module: str | None = None
    slow: bool = False


def use(folder: Path) -> None:
    """Import the package that lies in this folder, and no other, from now on."""
    there = sorted(name for name in sys.modules if name.split(".")[0] == "pentode")
    assert not there, f"imported before its time: {there}"
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.path.insert(0, str(folder))
    if "pytest" not in sys.modules and not _installed("pytest"):
        sys.modules["pytest"] = ModuleType(
            "pytest"
        )  # tests/helpers/config.py imports it, for functions not called here
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)


def strays(folder: Path, module: str | None) -> list[str]:
    """Modules of the package that do not come from this folder, or that lack the change that they should have."""
    found = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "pentode"}
    astray = [name for name, module in found.items() if not Path(str(module.__file__)).is_relative_to(folder)]
    return astray + ([module] if module is not None and not hasattr(found.get(module), STAND_INS) else [])


def expect(folder: Path, into: Path, *, layouts: int | None, share: tuple[int, int], pipe: Connection) -> None:
    """The body of a process: writes what one process makes of its share of the first layouts' problems.

    Tells how many layouts there are and which modules that took, or what went wrong.
    """
    use(folder)
    try:
        from tests.mutation.layouts import LAYOUTS, PROBLEMS, write_expected

        needed = {case.problem for case in LAYOUTS[:layouts]}
        number, of = share
        for problem in [problem for problem in PROBLEMS if problem in needed][number::of]:
            write_expected(problem, into / f"{PROBLEMS.index(problem)}.pt")
    except Exception:  # noqa: BLE001
        pipe.send(traceback.format_exc())
        return
    names = [name for name in sys.modules if name.split(".")[0] not in ("pentode", "tests", "__main__")]
    if any(case.overlap or (case.sequence_parallel and case.gather_again) for case in LAYOUTS[:layouts]):
        names.append("torch._dynamo")  # which an operator of ours imports when it is first called
    pipe.send((len(LAYOUTS[:layouts]), names))


def attempt(folder: Path, orders: Orders, pipe: Connection) -> None:
    """The body of a process: tells what becomes of the package in this folder."""
    os.setsid()  # so that all of its ranks can be ended at once
    begun = time.monotonic()
    use(folder)
    verdict = Verdict(None, "lives")
    try:
        if orders.slow:
            slow_down()
        from tests.mutation import layouts

        _record_meshes()
    except Exception:  # noqa: BLE001
        verdict = Verdict(orders.layouts[0], "raises", _said())
    else:
        for number in orders.layouts:
            verdict = _try(layouts.LAYOUTS[number].ranks, number, folder, orders)
            if verdict.layout is not None:
                break
    pipe.send(replace(verdict, seconds=time.monotonic() - begun))


def _try(ranks: int, number: int, folder: Path, orders: Orders) -> Verdict:
    """Run a layout on as many processes as it has ranks, and end them at the first that fails."""
    with tempfile.TemporaryDirectory() as meeting:
        processes, pipes = [], {}
        for rank in range(ranks):
            here, there = FORK.Pipe(duplex=False)
            arguments = (rank, ranks, number, folder, orders, f"file://{meeting}/ranks", there)
            process = FORK.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            there.close()
            processes.append(process)
            pipes[here] = rank
        verdict = _collect(pipes, number, orders.patience)
        for process in processes:
            process.kill()
            process.join()
    return verdict


def _collect(pipes: dict[Connection, int], number: int, patience: float) -> Verdict:
    """Hear all ranks out, or the first that fails, or until all that have not ended wait for each other."""
    end = time.monotonic() + patience
    idle: dict[int, str] = {}
    while pipes:
        ready = wait(list(pipes), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            return Verdict(number, "hangs", f"no answer from ranks {sorted(pipes.values())}")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes[pipe]
            try:
                how, said = pipe.recv()
            except EOFError:
                how, said = "raises", "the process has ended"
            idle.pop(rank, None)
            if how == "idle":
                idle[rank] = said
            elif how == "agrees":
                del pipes[pipe]
            elif how != "busy":
                return Verdict(number, how, f"rank {rank}: {said}")
        if pipes and idle.keys() >= set(pipes.values()):
            return Verdict(number, "hangs", "; ".join(f"rank {rank} {idle[rank]}" for rank in sorted(idle)))
    return Verdict(None, "lives")


def _rank(rank: int, ranks: int, number: int, folder: Path, orders: Orders, meeting: str, pipe: Connection) -> None:
    """The body of a rank's process."""
    from pentode.dist import gloo
    from tests.mutation import layouts

    how, said = "agrees", ""
    lock = threading.Lock()
    threading.Thread(target=_watch, args=(threading.get_ident(), pipe, lock), daemon=True).start()
    try:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)  # memory that nobody has written is full of NaN
        dist.init_process_group(gloo.register(), init_method=meeting, rank=rank, world_size=ranks)
        case = layouts.LAYOUTS[number]
        layouts.check(case, orders.expected / f"{layouts.PROBLEMS.index(case.problem)}.pt", rank=rank)
    except Exception as error:  # noqa: BLE001
        compared = any(frame.name in COMPARE for frame in traceback.extract_tb(error.__traceback__))
        how, said = "differs" if compared and isinstance(error, AssertionError) else "raises", _said()
    astray = strays(folder, orders.module)
    lock.acquire()  # for good: nothing is said after this
    pipe.send(("astray", ", ".join(astray)) if astray else (how, said))
    os._exit(0)  # groups are not taken down: others may hang in them


def _watch(thread: int, pipe: Connection, lock: threading.Lock) -> None:
    """The body of a thread: tells when another one has not computed anything for a while, and when it does again."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return
    clock = time.pthread_getcpuclockid(thread)
    times = deque([time.clock_gettime(clock)], maxlen=LOOKS + 1)
    idle = False
    while True:
        time.sleep(STUCK / LOOKS)
        times.append(time.clock_gettime(clock))
        was, idle = idle, len(times) == times.maxlen and times[-1] - times[0] < IDLE
        if idle != was:
            frame = sys._current_frames()[thread]
            with lock:
                pipe.send(("idle" if idle else "busy", f"in {frame.f_code.co_qualname}, line {frame.f_lineno}"))


def _said() -> str:
    error = sys.exc_info()[1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _record_meshes() -> None:
    """Let the stand-ins know the axes of this process."""
    from pentode import stand_ins  # pyright: ignore[reportAttributeAccessIssue]
    from pentode.dist.mesh import Mesh

    stand_ins.watch(Mesh, slow=False)


def slow_down() -> None:
    """Make messages late, so that who does not wait for them reads too early."""

    def slow(function: Any, late: Callable[[int], bool], pause: float = PAUSE) -> Any:
        @wraps(function)
        def slowly(*arguments: Any, **options: Any) -> Any:
            if late(dist.get_rank()):
                time.sleep(pause)
            return function(*arguments, **options)

        return slowly

    for name in filter(dist.__dict__.__contains__, SENDS):
        setattr(dist, name, slow(getattr(dist, name), lambda _: True))
    for name in filter(dist.__dict__.__contains__, SUMS):
        setattr(dist, name, slow(getattr(dist, name), lambda rank: rank > 0))
    for name in filter(dist.__dict__.__contains__, JOINS):
        setattr(dist, name, slow(getattr(dist, name), lambda rank: rank == 0, LONG_PAUSE))
    from pentode.dist.p2p import Channels

    Channels.send = slow(Channels.send, lambda _: True)


def _installed(name: str) -> bool:
    try:
        __import__(name)
    except ModuleNotFoundError:
        return False
    return True
