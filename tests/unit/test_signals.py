"""How often ranks ask each other whether one of them was asked to stop."""

import pytest
import torch
from torch import Tensor

from pentode.dist import collectives
from pentode.dist.mesh import Axis
from pentode.train import signals
from pentode.train.signals import StopSignal

CPU = torch.device("cpu")
PAIR = Axis("world", size=2)


def asking_steps(
    monkeypatch: pytest.MonkeyPatch, *, here: float, there: float, grace_s: float | None, steps: int
) -> list[int]:
    """The steps at which two ranks ask each other, where a step takes so many seconds on one and on the other."""
    now, asked = [1000.0], [0]

    def max_(own: Tensor, axis: Axis) -> Tensor:
        asked[0] += 1
        return torch.maximum(own, torch.tensor([0, 0, int(there * signals.MICROSECONDS)]))

    monkeypatch.setattr(collectives, "max_", max_)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    stop, found = StopSignal(CPU, grace_s=grace_s), []
    for step in range(steps):
        before = asked[0]
        assert stop.asked_anywhere(PAIR, step=step, now=step == 0) == (False, False)
        if asked[0] > before:
            found.append(step)
        now[0] += here
    return found


def test_a_signal_that_was_heard_elsewhere_is_acted_on_at_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "max_", lambda own, axis: torch.maximum(own, torch.tensor([15, 0, 1])))
    stop = StopSignal(CPU)
    assert stop.asked_anywhere(PAIR, step=4, now=True) == (True, False)  # as in waiting for a place
    assert stop.asked_anywhere(PAIR, step=4, now=False) == (True, False)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(
    ("seconds", "grace_s", "expected"),
    [
        (1.0, None, [0, 1, 6, 11, 16]),  # every five seconds
        (1.0, 60.0, [0, 1, 6, 11, 16]),
        (1.0, 20.0, [0, 1, 3, 5, 7, 9, 11, 13, 15, 17]),  # a tenth of the grace
        (30.0, 60.0, list(range(18))),  # every step
        (0.001, 60.0, [0, 1]),
    ],
)
def test_ranks_ask_each_other_by_the_time_that_steps_take_on_the_slowest(
    monkeypatch: pytest.MonkeyPatch, seconds: float, grace_s: float | None, expected: list[int], slow: bool
) -> None:
    here, there = (seconds, seconds / 100) if slow else (seconds / 100, seconds)
    assert asking_steps(monkeypatch, here=here, there=there, grace_s=grace_s, steps=18) == expected
