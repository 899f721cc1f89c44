"""The learning rate at its corners, and at the values that Nanotron's tutorial prints."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pentode.config.schema import LRSchedulerArgs
from pentode.log import human
from pentode.optim.schedule import learning_rate

PEAK, FLOOR = 3e-4, 1e-5


def rate(step: int, *, train_steps: int = 100, **fields: Any) -> float:
    return learning_rate(step, LRSchedulerArgs(learning_rate=PEAK, **fields), train_steps=train_steps)


def test_the_tutorials_printed_values() -> None:
    fields = {"lr_warmup_steps": 2, "lr_warmup_style": "linear", "lr_decay_style": "cosine", "lr_decay_steps": 13}
    found = [human(rate(step, train_steps=15, min_decay_lr=FLOOR, **fields)) for step in range(1, 16)]
    want = "0.00015 0.0003 0.000296 0.000283 0.000264 0.000237 0.000206 0.000172 0.000138 0.000104 7.26e-05 4.65e-05 "
    assert found == (want + "2.66e-05 1.42e-05 1e-05").split()


def test_linear_warmup_never_gives_zero_and_ends_at_the_peak() -> None:
    fields = {"lr_warmup_steps": 4, "lr_warmup_style": "linear"}
    assert [rate(step, **fields) for step in (1, 2, 3, 4)] == [PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK]


def test_constant_warmup_is_the_peak() -> None:
    assert rate(1, lr_warmup_steps=4, lr_warmup_style="constant") == PEAK


def test_warmup_is_linear_where_no_style_is_given() -> None:
    assert rate(1, lr_warmup_steps=4) == PEAK / 4


@pytest.mark.parametrize("style", ["linear", "cosine", "1-sqrt"])
def test_nothing_decays_without_a_floor(style: str) -> None:
    assert {rate(step, lr_decay_style=style) for step in (1, 50, 100, 200)} == {PEAK}


@pytest.mark.parametrize(("style", "left"), [("linear", 0.75), ("cosine", (1 + math.sqrt(0.5)) / 2), ("1-sqrt", 0.5)])
def test_each_style_at_a_quarter_of_the_decay_and_at_its_ends(style: str, left: float) -> None:
    fields = {
        "lr_warmup_steps": 10,
        "lr_warmup_style": "linear",
        "lr_decay_style": style,
        "lr_decay_starting_step": 20,
        "lr_decay_steps": 40,
        "min_decay_lr": FLOOR,
    }
    assert rate(11, **fields) == rate(19, **fields) == PEAK  # the plateau
    assert rate(20, **fields) == pytest.approx(PEAK, rel=1e-15)
    assert rate(30, **fields) == pytest.approx(FLOOR + (PEAK - FLOOR) * left, rel=1e-12)
    assert rate(59, **fields) > FLOOR
    assert rate(60, **fields) == rate(61, **fields) == rate(1000, **fields) == FLOOR


def test_decay_takes_all_remaining_steps_by_default() -> None:
    assert rate(100, lr_warmup_steps=10, lr_warmup_style="linear", min_decay_lr=0.0) == 0.0
    assert rate(99, lr_warmup_steps=10, lr_warmup_style="linear", min_decay_lr=0.0) == pytest.approx(PEAK / 90)
    late = {"lr_warmup_steps": 10, "lr_warmup_style": "linear", "lr_decay_starting_step": 80, "min_decay_lr": 0.0}
    assert rate(90, **late) == pytest.approx(PEAK / 2)
    assert rate(100, **late) == 0.0


def test_a_decay_of_no_steps_is_no_decay() -> None:
    assert rate(50, lr_decay_steps=0, min_decay_lr=FLOOR) == PEAK
    assert rate(10, train_steps=10, lr_warmup_steps=10, lr_warmup_style="linear", min_decay_lr=FLOOR) == PEAK


@given(
    st.integers(0, 20),
    st.none() | st.integers(20, 40),
    st.none() | st.integers(0, 60),
    st.sampled_from(["linear", "cosine", "1-sqrt"]),
)
def test_the_rate_rises_through_the_warmup_then_never_rises(
    warmup: int, start: int | None, steps: int | None, style: str
) -> None:
    rates = [
        rate(
            step,
            lr_warmup_steps=warmup,
            lr_warmup_style="linear",
            lr_decay_starting_step=start,
            lr_decay_steps=steps,
            lr_decay_style=style,
            min_decay_lr=FLOOR,
        )
        for step in range(1, 120)
    ]
    assert all(0 < r <= PEAK for r in rates)
    assert rates[: max(warmup, 1)] == sorted(rates[: max(warmup, 1)])
    after = rates[max(warmup, 1) - 1 :]
    assert after == sorted(after, reverse=True)
