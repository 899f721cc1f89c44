"""Signals that ask a run to stop: they set a flag, and the loop stops between two steps, its state saved."""

import signal
from types import FrameType, TracebackType

from pentode import log
from pentode.errors import Interrupted, Preempted

PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)  # from a scheduler before its limit


class StopSignal:
    """Listens while it is entered. A second Ctrl-C does not wait for the step to end."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (*PREEMPTION, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def error(self, where: str) -> Preempted | Interrupted:
        """What the run ends with; `where` says what was saved."""
        kind = Interrupted if self.asked == signal.SIGINT else Preempted
        return kind(f"{self.asked.name}: {where}; the same command goes on from there")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)
        log.warning(f"{self.asked.name}: stopping after this step")
