"""What a run needs until its end is set aside from garbage collection, and given back."""

import gc
import weakref

from pentode.train.collector import SETTLED, Collector


class Ring:
    """Refers to itself, so that only the collector finds it."""

    def __init__(self) -> None:
        self.itself = self


def test_what_lives_after_the_first_steps_is_not_looked_through_until_the_run_ends() -> None:
    ring, before = Ring(), gc.get_freeze_count()
    gone = weakref.ref(ring)
    with Collector() as collector:
        for step in range(SETTLED):
            assert gc.get_freeze_count() == before, step
            collector.step_done()
        assert gc.get_freeze_count() > before
        del ring
        gc.collect()
        assert gone() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert gone() is None
