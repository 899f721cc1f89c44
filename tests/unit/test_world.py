"""Ranks of tests' worlds that end tell how, and what they said last; the next call has new ones."""

import os
import signal
import sys

import pytest
import torch.distributed as dist

from tests.helpers.world import World

# One without a name, where there are such: macOS has none.
NUMBERS = [signal.SIGTERM, signal.SIGKILL, *([signal.SIGRTMIN + 1] if hasattr(signal, "SIGRTMIN") else [])]


def number_or_end(number: int | None = None) -> int:
    """This rank, or the end of rank 1 by that signal."""
    if number is not None and dist.get_rank() == 1:
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), number)
    dist.barrier()
    return dist.get_rank()


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_a_rank_that_a_signal_ends_tells(number: int) -> None:
    world = World()
    try:
        with pytest.raises(AssertionError) as caught:
            world.run(number_or_end, 2, number=number)
        told = str(caught.value).partition("rank 1:")[2]
        how = signal.Signals(number).name if number in set(signal.Signals) else f"-{number}"
        assert how in told.splitlines()[1]
        assert "last words" in told
        assert world.run(number_or_end, 2) == [0, 1]
    finally:
        world.close()
