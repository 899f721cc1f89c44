"""Runs of `pentode` on several ranks, forked from a process that has imported all of it: a start costs milliseconds.

The ranks find each other as torchrun's do, at a store which their parent holds on a port that the system chooses.
Nothing here sleeps: who waits for a process waits on its descriptor, for as long as it has time.
"""

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist

PORT_DIGITS = 6
STUCK = 120.0  # seconds after which a process that should end is taken for hung

Prepare = Callable[[int], object]  # called in each rank with its number, before the command


class Ranks:
    """One run's processes. `codes` has the exit code of each that has ended, minus the signal's number if one did."""

    everywhere: ClassVar[list[Prepare]] = []  # called in each rank of each run, first

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        output: Path,
        world: int = 2,
        prepare: Prepare | None = None,
        everywhere: bool = True,
        attach: Callable[[list[int]], object] | None = None,
    ) -> None:
        """Start `pentode ARGUMENTS` on `world` ranks; what they print is appended to the file `output`.

        prepare     called in each rank, with its number, before it begins
        everywhere  so is what all runs of this process begin with
        attach      called here with the process ids, before any rank begins
        """
        self.codes: dict[int, int] = {}
        first = [*(Ranks.everywhere if everywhere else []), *([prepare] if prepare is not None else [])]
        here, there = os.pipe()
        self.pids = [_fork(rank, arguments, here, there, output, world, first) for rank in range(world)]
        os.close(here)
        if attach is not None:
            attach(self.pids)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if world > 1 else None
        os.write(there, b"%*d" % (PORT_DIGITS, self.store.port if self.store else 0) * world)
        os.close(there)

    def kill(self, ranks: Sequence[int] | None = None, *, number: int = signal.SIGKILL) -> None:
        """Send a signal to those of `ranks`, or of all, that have not been waited for."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if rank not in self.codes:
                with suppress(ProcessLookupError):
                    os.kill(self.pids[rank], number)

    def wait(self, seconds: float = STUCK) -> bool:
        """Whether all have ended within that time."""
        end = time.monotonic() + seconds
        for rank in range(len(self.pids)):
            self.wait_for(rank, end - time.monotonic())
        return len(self.codes) == len(self.pids)

    def wait_for(self, rank: int, seconds: float) -> bool:
        """Whether that rank has ended within that time."""
        if rank in self.codes:
            return True
        waiting = os.pidfd_open(self.pids[rank])
        try:
            ended = bool(select.select([waiting], [], [], max(0.0, seconds))[0])
        finally:
            os.close(waiting)
        if ended:
            self.codes[rank] = os.waitstatus_to_exitcode(os.waitpid(self.pids[rank], 0)[1])
        return ended

    def finish(self, seconds: float = STUCK) -> list[int]:
        """The exit codes, when all have ended by themselves or, one having failed, have been ended as launchers do.

        Raises TimeoutError where they do not end.
        """
        end = time.monotonic() + seconds
        while len(self.codes) < len(self.pids):
            ended = self._next(end - time.monotonic())
            if ended is None:
                self.close()
                raise TimeoutError(f"ranks did not end within {seconds:.0f} s")
            if self.codes[ended] != 0 and not self.wait(GRACE):
                self.kill()
        self.close()
        return [self.codes[rank] for rank in range(len(self.pids))]

    def close(self) -> None:
        """Leave no process behind."""
        self.kill()
        self.wait()
        self.store = None

    def _next(self, seconds: float) -> int | None:
        """A rank that ends next; None if none does within that time."""
        waiting = {os.pidfd_open(pid): rank for rank, pid in enumerate(self.pids) if rank not in self.codes}
        try:
            ended = select.select(list(waiting), [], [], max(0.0, seconds))[0]
        finally:
            for descriptor in waiting:
                os.close(descriptor)
        if not ended:
            return None
        self.wait_for(waiting[ended[0]], 0.0)
        return waiting[ended[0]]


GRACE = 5.0  # seconds that the others have to end by themselves when one has failed


def _fork(
    rank: int, arguments: Sequence[str], here: int, there: int, output: Path, world: int, first: Sequence[Prepare]
) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.close(there)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        port = os.read(here, PORT_DIGITS)
        if port:
            code = _rank_main(rank, arguments, int(port), world, first)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _rank_main(rank: int, arguments: Sequence[str], port: int, world: int, first: Sequence[Prepare]) -> int:
    from pentode.cli import run_command

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for each in first:
        each(rank)
    return run_command(list(arguments))
