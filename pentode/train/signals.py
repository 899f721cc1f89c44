"""Signals that ask a run to stop: between two steps, its state saved; at once, while there is nothing to save."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import torch

from pentode.dist import collectives
from pentode.dist.mesh import Axis
from pentode.errors import Interrupted, Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # the first two from a scheduler, before its limit


class StopSignal:
    """Listens while it is entered, in the main thread. A second Ctrl-C does not wait for the step to end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.asked: signal.Signals | None = None
        self.patient = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # no other thread can listen
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    @contextmanager
    def until_saved(self) -> Iterator[None]:
        """While steps are done: a signal is only noted. Elsewhere it ends the run where it stands."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False

    def asked_anywhere(self, world: Axis, *, now: bool, trouble: bool = False) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether any has `trouble`.

        With several ranks they agree on that where `now`, and else go on: a signal or trouble reaches ranks at
        different steps, and none may leave the others in a collective.
        """
        if world.size == 1:
            return self.asked is not None, trouble
        if not now:
            return False, False
        own = torch.tensor([self.asked or 0, int(trouble)], device=self.device)
        number, anywhere = collectives.max_(own, world).tolist()
        if number:  # never back to None: a signal may have come since this rank looked
            self.asked = signal.Signals(number)
        return number != 0, anywhere != 0

    def error(self, where: str) -> Preempted | Interrupted:
        """What the run ends with; `where` says what was saved."""
        kind = Interrupted if self.asked == signal.SIGINT else Preempted
        return kind(f"{self.asked.name}: {where}; the same command goes on from there")

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.asked == signal.SIGINT == number
        self.asked = signal.Signals(number)  # and nothing else: a print may have been interrupted
        if again:
            raise KeyboardInterrupt
        if not self.patient:
            raise self.error("nothing was trained since the last checkpoint")
