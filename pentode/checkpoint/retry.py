"""Calls over a network, made again while they fail for a reason that passes: waits that grow, and a limit to them all.

Time and waiting are passed in, so that tests need neither.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from pentode import log

T = TypeVar("T")


class PassingError(Exception):
    """A call failed for a reason that may pass: a lost connection, a server that is too busy."""


class GivenUpError(Exception):
    """Such calls have failed for as long as they may, or somebody waits no more."""


@dataclass(frozen=True)
class Clock:
    """What tells the time in seconds, and what waits: for so many seconds, or until the event is set."""

    now: Callable[[], float] = time.monotonic
    wait: Callable[[threading.Event, float], object] = lambda event, seconds: event.wait(seconds)


@dataclass
class Patience:
    """How long the calls of one piece of work, a checkpoint's upload, may fail; several threads may share it.

    what   is being done, for the log: `s3://bucket/run/40`
    limit  seconds in which no call succeeds, added up over the work
    stop   set by whoever wants no more waiting
    """

    what: str
    limit: float = 300.0
    clock: Clock = Clock()
    stop: threading.Event = field(default_factory=threading.Event)
    first_wait: float = 0.5
    longest_wait: float = 30.0
    retries: int = 0
    _spent: float = 0.0  # in failing that ended
    _since: float | None = None  # failing now, since then
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def call(self, function: Callable[[], T]) -> T:
        """What the function gives, called again after each PassingError; raises GivenUpError when patience ends."""
        wait = self.first_wait
        while True:
            if self.stop.is_set():
                raise GivenUpError("it was told to stop")
            began = self.clock.now()
            try:
                found = function()
            except PassingError as error:
                self._failed(error, began)
            else:
                self._succeeded()
                return found
            self.clock.wait(self.stop, wait * random.uniform(0.5, 1.0))  # so that not all of a cluster come at once
            wait = min(2 * wait, self.longest_wait)

    def _failed(self, error: PassingError, began: float) -> None:
        with self._lock:
            first = self.retries == 0
            self.retries += 1
            self._since = began if self._since is None else self._since
            failing = self._spent + self.clock.now() - self._since
        if failing >= self.limit:
            raise GivenUpError(f"{error}, for {failing:.0f} s") from error
        if first:
            log.warning(f"{self.what}: {error}; trying again, for up to {self.limit:.0f} s")

    def _succeeded(self) -> None:
        with self._lock:
            if self._since is not None:
                self._spent += self.clock.now() - self._since
                self._since = None
