"""A signal that ends one rank alone, and the others, whose next collective then fails: they end as it did.

The rank that leaves says so at the store in which they met, before its connections close. Of several that do, one tells.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from pentode.errors import Interrupted, PentodeError, Preempted, RankError, from_json, to_json

LEFT = "left"  # key of what the first rank that left said
LOST = re.compile(r"gloo/transport/.*(closed by peer|reset by peer|Broken pipe)")  # what gloo says of a dead process


@contextmanager
def heard_by_others(store: dist.Store | None, *, rank: int) -> Iterator[None]:
    """While this lasts, a signal that ends this rank ends the others with the same code, and they need not tell of it.

    What any other end of a rank does to the others is an error of one line. `store` is None for a process alone.
    """
    try:
        yield
    except (Preempted, Interrupted, KeyboardInterrupt) as error:
        if store is not None:
            _say(error, store, rank)
        raise
    except PentodeError:
        raise
    except RuntimeError as error:
        found = None if store is None else _said(store)
        if found is not None:
            raise found from error
        if LOST.search(str(error)):
            what = f"rank {rank}: the connection to another rank is lost; see what that one, or its host, says"
            raise RankError(what) from error
        raise


def raise_if_one_left(store: dist.Store) -> None:
    """End as a rank did that has left for a signal, if one has: it will not come to where others wait for it."""
    found = _said(store)
    if found is not None:
        raise found


def _say(error: Preempted | Interrupted | KeyboardInterrupt, store: dist.Store, rank: int) -> None:
    """Tell the others why this rank leaves; if one of them has done so already, `error` is told."""
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted("SIGINT: nothing was trained yet")
    own = json.dumps({"rank": rank, **to_json(error)})
    with suppress(RuntimeError):  # the store's process may be gone
        error.told = store.compare_set(LEFT, "", own).decode() != own


def _said(store: dist.Store) -> PentodeError | None:
    """What a rank said that left; it has told it, or another one has."""
    with suppress(RuntimeError):
        if store.check([LEFT]):
            error = from_json(json.loads(store.get(LEFT)))
            error.told = True
            return error
    return None
