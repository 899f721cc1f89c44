"""Signals that ask a run to stop: between two steps, its state saved; at once, while there is nothing to save."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import torch

from pentode.dist import collectives
from pentode.dist.mesh import Axis
from pentode.errors import Interrupted, Preempted

ENDING = (signal.SIGTERM, signal.SIGUSR1)  # after which a scheduler kills the process before long
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # the first two from a scheduler, before its limit
RARELY = 5.0  # seconds between two times that ranks ask each other, or a tenth of the grace if that is less
MICROSECONDS = 1e6


class StopSignal:
    """Listens while it is entered, in the main thread. A second Ctrl-C does not wait for the step to end.

    grace_s  seconds after SIGTERM or SIGUSR1, here or on the rank that told of it, after which the process ends with
             code 75 wherever it stands, even in a call that does not return; None: never
    """

    def __init__(self, device: torch.device, *, grace_s: float | None = None) -> None:
        self.device, self.grace_s = device, grace_s
        self._limit: threading.Timer | None = None
        self._watcher: threading.Thread | None = None
        self._left = False
        self._deciding = threading.Lock()  # whether the limit begins, or the run is left
        self._wakes: tuple[int, int] | None = None  # a pipe into which the kernel's signals are written at once
        self._wakeup_before = -1
        self.asked: signal.Signals | None = None
        self.patient = False
        self._before: dict[signal.Signals, object] = {}
        self._every = min(RARELY, math.inf if grace_s is None else grace_s / 10)
        self._asked_at: tuple[int, float] | None = None  # the step and the time at which ranks asked each other last
        self._ask_again = 0  # the step at which they do at the latest, on all the same

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # no other thread can listen
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
            if self.grace_s is not None:
                self._watch()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if self._wakes is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._wakes[1])  # which ends the thread that reads
            self._wakes = None
        if self._watcher is not None:
            self._watcher.join(1.0)  # a thread that lives while Python ends may abort the process
        with self._deciding:
            self._left = True  # a signal may still be in the pipe
            if self._limit is not None:
                self._limit.cancel()

    @contextmanager
    def until_saved(self) -> Iterator[None]:
        """While steps are done: a signal is only noted. Elsewhere it ends the run where it stands."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False

    def asked_anywhere(self, world: Axis, *, step: int, now: bool, trouble: bool = False) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether any has `trouble`.

        A signal or trouble reaches ranks at different steps, and none may leave the others in a collective. So several
        ranks agree on it, which makes them wait for their devices: where `now`, and whenever by the seconds that steps
        took on the slowest it is time again. All must call with the same `step` and `now`.
        """
        if world.size == 1:
            return self.asked is not None, trouble
        if not now and step < self._ask_again:
            return False, False
        seconds = self._seconds_a_step(step)
        own = torch.tensor([self.asked or 0, int(trouble), int(seconds * MICROSECONDS)], device=self.device)
        number, anywhere, slowest = collectives.max_(own, world).tolist()
        self._asked_at = step, time.monotonic()
        self._ask_again = step + max(1, int(self._every * MICROSECONDS / max(1, slowest)))
        if number:  # never back to None: a signal may have come since this rank looked
            self._ask_again = step  # wherever they heard of it, the loop acts on it at once
            self.asked = signal.Signals(number)
            self._begin_grace(number)
        return number != 0, anywhere != 0

    def _seconds_a_step(self, step: int) -> float:
        """What the steps since ranks last asked each other took here, each; at first, long enough to ask again soon."""
        before, when = self._asked_at or (step, 0.0)
        return (time.monotonic() - when) / (step - before) if step > before else self._every

    def error(self, where: str) -> Preempted | Interrupted:
        """What the run ends with; `where` says what was saved."""
        kind = Interrupted if self.asked == signal.SIGINT else Preempted
        return kind(f"{self.asked.name}: {where}; the same command goes on from there")

    def _watch(self) -> None:
        """Notice signals from a thread: this one may be in a call that never returns, where no handler runs."""
        reads, writes = self._wakes = os.pipe()
        os.set_blocking(writes, False)
        self._wakeup_before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)

        def read() -> None:
            while number := os.read(reads, 1):
                self._begin_grace(number[0])
            os.close(reads)

        self._watcher = threading.Thread(target=read, name="signals", daemon=True)
        self._watcher.start()

    def _begin_grace(self, number: int) -> None:
        with self._deciding:
            if self.grace_s is not None and self._limit is None and number in ENDING and not self._left:
                self._limit = threading.Timer(self.grace_s, self._end, (number,))
                self._limit.daemon = True
                self._limit.start()

    def _end(self, number: int) -> None:
        """End the process: no lock, log or collective is to be trusted any more."""
        line = (
            f"pentode: {signal.Signals(number).name}: not saved within checkpoints.grace_s={self.grace_s:g} s; the "
            "checkpoints before stay, and the same command goes on from the newest\n"
        )
        os.write(2, line.encode())
        os._exit(Preempted.exit_code)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.asked == signal.SIGINT == number
        self.asked = signal.Signals(number)  # and nothing else: a print may have been interrupted
        if again:
            raise KeyboardInterrupt
        if not self.patient:
            raise self.error("nothing was trained since the last checkpoint")
