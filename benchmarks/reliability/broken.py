"""Ways to break pentode on purpose, each a function of a rank's process: what campaigns must notice to mean anything.

The first line of each says what is broken, and is printed with the figures.
"""

import os
import re
from pathlib import Path
from typing import Any

from pentode.checkpoint import storage
from pentode.checkpoint.folder import Checkpoint

TEMPORARY = re.compile(r"/\.tmp-(\d+)-[0-9a-f]{8}")


def trusting(rank: int) -> None:
    """checksums are not compared, only sizes"""
    Checkpoint.prove = lambda self, name: self._check_size(name)


def untidy(rank: int) -> None:
    """what a failed save began is not removed"""
    storage.remove = lambda path: None


def deaf(rank: int) -> None:
    """signals that ask a run to stop are not heard"""
    import signal

    from pentode.train.signals import SIGNALS, StopSignal

    def ignore(self: StopSignal) -> StopSignal:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        return self

    StopSignal.__enter__ = ignore


def in_place(rank: int) -> None:
    """checkpoints are written straight into the folder that is theirs"""
    storage.os = InPlaceOs()


class InPlaceOs:
    """`os`, for which a temporary folder is the folder that it would be renamed to."""

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in ("open", "mkdir", "unlink", "rmdir", "listdir"):
            return real
        return lambda path, *more, **named: real(self._there(path), *more, **named)

    def rename(self, source: Path, target: Path) -> None:
        if self._there(source) != str(target):
            os.rename(self._there(source), target)

    def _there(self, path: Path | str) -> str:
        return TEMPORARY.sub(r"/\1", str(path))
