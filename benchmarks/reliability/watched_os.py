"""`os` as pentode.checkpoint.storage uses it, with somebody watching: each changing call is told before it is made."""

import os
import threading
from collections.abc import Callable
from typing import Any

CHANGING = ("mkdir", "open", "write", "fsync", "close", "rename", "unlink", "rmdir")

Watch = Callable[[int, str, Callable[[], object]], object]


class WatchedOs:
    """Calls `watch(number, name, half)` before each changing call of this process; it may raise, or end all.

    number  counts from 0, whichever thread calls
    half    does the half of what is to be written; nothing for any other call
    """

    def __init__(self, watch: Watch, inner: Any = os) -> None:
        self.watch, self.inner = watch, inner
        self.number = 0
        self.lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.inner, name)
        return self._watched(name, real) if name in CHANGING else real

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            with self.lock:
                number, self.number = self.number, self.number + 1
            self.watch(number, name, lambda: _half(name, real, arguments))
            return real(*arguments, **named)

        return call


def _half(name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if name == "write":
        real(arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2])
    elif name == "close":
        real(*arguments)  # a file whose close fails is closed
