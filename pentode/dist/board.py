"""A board on which ranks tell each other things, from any thread: the store in which they met, and no collective.

Collectives of two threads would meet each other's; what ranks agree on beside the training goes this way.
"""

import json
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from pentode.errors import PentodeError, RankError, from_json, to_json

T = TypeVar("T")
PATIENCE = 20 * 60.0  # seconds, as a collective has: the slowest disk of all ranks decides how long a save takes
SHORTEST, LONGEST = 0.001, 0.5  # seconds between two looks at the board
ERROR = "pentode error"
NEVER = threading.Event()


class Cancelled(BaseException):
    """Nobody needs any more what a thread was doing."""


class Board:
    """This rank's place at a board of `size` ranks; they must call `gather` equally often, each from one thread.

    name       that no other board of these processes has
    cancelled  ends waiting with Cancelled
    """

    def __init__(self, name: str, size: int, rank: int, cancelled: threading.Event) -> None:
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"board {name}", store)
        self._size, self._rank, self._cancelled = size, rank, cancelled
        self._turn = 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order: what JSON holds, errors of ours among it; tuples come as lists."""
        turn, self._turn = self._turn, self._turn + 1
        own = [f"{turn} of {rank}" for rank in range(self._size)]
        self._store.set(own[self._rank], json.dumps(value, default=_encode))
        if self._rank == 0:  # reads them for all: a thousand ranks would ask a million times
            self._wait(own)
            self._store.set(f"{turn}", f"[{','.join(self._store.get(key).decode() for key in own)}]")
            for key in [*own, f"{turn - 1}"]:  # all ranks have read that: they have come to this turn
                if key != "-1":
                    self._store.delete_key(key)
        self._wait([f"{turn}"])
        return json.loads(self._store.get(f"{turn}"), object_hook=_decode)

    def _wait(self, keys: list[str]) -> None:
        late = f"saving: another rank has not written its part of the checkpoint in {PATIENCE:.0f} s"
        wait_for(self._store, keys, late=late, cancelled=self._cancelled)


def wait_for(
    store: dist.Store,
    keys: list[str],
    *,
    late: str,
    cancelled: threading.Event | None = None,
    look: Callable[[], object] = bool,
) -> None:
    """Return when the keys are there; a RankError says `late` if they do not come, and what `look` raises ends this.

    Asks again and again: waiting in the store would keep other threads from it, and this one from hearing signals.
    """
    pause, end = SHORTEST, time.monotonic() + PATIENCE
    while not store.check(keys):
        if (cancelled or NEVER).wait(pause):
            raise Cancelled
        look()
        if time.monotonic() > end:
            raise RankError(late)
        pause = min(2 * pause, LONGEST)


def _encode(value: object) -> dict[str, object]:
    if isinstance(value, PentodeError):
        return {ERROR: to_json(value)}
    raise TypeError(f"a board holds JSON, not {type(value).__name__}")


def _decode(found: dict[str, dict[str, object]]) -> object:
    return from_json(found[ERROR]) if found.keys() == {ERROR} else found
