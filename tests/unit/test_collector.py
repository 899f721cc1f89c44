"""What a run needs until its end is set aside from garbage collection, and given back."""

import gc
import weakref

from pentode.train.collector import SETTLED, Collector


class Ring:
    """Refers to itself, so that only the collector finds it."""

    def __init__(self) -> None:
        self.itself = self


def test_what_lives_after_the_first_steps_is_not_looked_through_until_the_run_ends() -> None:
    with Collector() as collector:
        ring = Ring()
        gone = weakref.ref(ring)
        for _ in range(SETTLED):
            collector.step_done()
        del ring
        gc.collect()
        assert gone() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert gone() is None


def test_what_a_start_leaves_goes_when_the_first_steps_are_done() -> None:
    ring, dropped = Ring(), weakref.ref(Ring())
    gone = weakref.ref(ring)
    with Collector() as collector:
        assert gc.get_freeze_count() > 0
        assert dropped() is None
        del ring
        for _ in range(SETTLED):
            gc.collect()
            assert gone() is not None
            collector.step_done()
        assert gone() is None
