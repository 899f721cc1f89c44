"""Every schedule does each action once without deadlock, in the time and memory that its docstring says."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pentode.config.load import config_from_dict
from pentode.errors import ConfigError
from pentode.parallel.pipeline.schedules import ENGINES, Action, Schedule, forward_only, make_schedule
from pentode.parallel.pipeline.simulate import simulate
from tests.helpers.config import small

RANKS, MICRO_BATCHES, STAGES_PER_RANK = range(1, 7), range(1, 14), range(1, 5)


def fitting(engine: str) -> Iterator[tuple[int, int, int]]:
    """All (p, m, v) up to those sizes that an engine takes."""
    for p in RANKS:
        for v in STAGES_PER_RANK if engine != "1f1b" else [1]:
            for m in MICRO_BATCHES:
                if engine != "interleaved" or m % p == 0:
                    yield p, m, v


def flush_bubble(p: int, m: int, v: int) -> float:
    """Of all forwards in one phase, stage after stage, as AFAB's docstring has it."""
    return (p - 1) / (v * m + p - 1) if m >= p else 1 - v * m / (v * p + m - 1)


BUBBLES = {
    "afab": flush_bubble,
    "1f1b": lambda p, m, v: (p - 1) / (m + p - 1),
    "interleaved": lambda p, m, v: (p - 1) / (v * m + p - 1),
}
LIVE = {
    "afab": lambda p, m, v, r: v * m,
    "1f1b": lambda p, m, v, r: min(m, p - r),
    "interleaved": lambda p, m, v, r: min(v * m, (v - 1) * p + 2 * (p - 1 - r) + 1),
}


def test_every_engine_has_its_formulas_here() -> None:
    assert BUBBLES.keys() == LIVE.keys() == ENGINES.keys()


@pytest.mark.parametrize("engine", ENGINES)
def test_every_action_is_done_once_on_the_rank_of_its_stage(engine: str) -> None:
    for p, m, v in fitting(engine):
        schedule = make_schedule(engine, pp=p, micro_batches=m, stages_per_rank=v)
        stages = p * v if p > 1 else 1
        assert schedule.placement == tuple(stage % p for stage in range(stages))
        assert schedule.stages_of(p - 1) == list(range(p - 1, stages, p))
        done = [action for program in schedule.programs for action in program]
        assert sorted(done) == [Action(kind, s, i) for kind in "BF" for s in range(stages) for i in range(m)]
        assert simulate(schedule).spans.keys() == set(done)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("backward", [1.0, 2.0, 3.5])
def test_the_bubble_is_the_formulas(engine: str, backward: float) -> None:
    for p, m, v in fitting(engine):
        schedule = make_schedule(engine, pp=p, micro_batches=m, stages_per_rank=v)
        bubble = simulate(schedule, costs={"F": 1.0, "B": backward}).bubble
        want = BUBBLES[engine](p, m, v) if p > 1 else 0.0
        assert bubble == pytest.approx(want, abs=1e-12), (p, m, v)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_live_is_the_formulas(engine: str) -> None:
    for p, m, v in fitting(engine):
        live = simulate(make_schedule(engine, pp=p, micro_batches=m, stages_per_rank=v)).peak_live
        assert live == tuple(LIVE[engine](p, m, v, r) if p > 1 else 1 for r in range(p)), (p, m, v)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_rank_does_forward_and_backward_in_turn(engine: str) -> None:
    schedule = make_schedule(engine, pp=1, micro_batches=3, stages_per_rank=2)
    assert " ".join(map(str, schedule.programs[0])) == "F0@0 B0@0 F1@0 B1@0 F2@0 B2@0"


def test_1f1b_fills_the_pipeline_then_alternates() -> None:
    first, last = make_schedule("1f1b", pp=2, micro_batches=3).programs
    assert " ".join(map(str, first)) == "F0@0 F1@0 B0@0 F2@0 B1@0 B2@0"
    assert " ".join(map(str, last)) == "F0@1 B0@1 F1@1 B1@1 F2@1 B2@1"


def test_forwards_alone_take_what_their_docstring_says() -> None:
    for p in RANKS:
        for m in MICRO_BATCHES:
            for v in STAGES_PER_RANK:
                schedule = forward_only([stage % p for stage in range(p * v)], micro_batches=m)
                timeline = simulate(schedule)
                assert len(timeline.spans) == p * v * m
                assert timeline.bubble == pytest.approx(flush_bubble(p, m, v), abs=1e-12), (p, m, v)
                assert timeline.peak_live == (0,) * p


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(1, 5))
def test_forwards_alone_run_on_any_placement(placement: list[int], micro_batches: int) -> None:
    schedule = forward_only(placement, micro_batches=micro_batches)
    assert len(schedule.programs) == max(placement) + 1
    assert len(simulate(schedule).spans) == len(placement) * micro_batches


@pytest.mark.parametrize("engine", ["afab", "1f1b"])
def test_fewer_micro_batches_than_ranks_are_enough(engine: str) -> None:
    timeline = simulate(make_schedule(engine, pp=6, micro_batches=1))
    assert timeline.makespan == 6 * (1 + 2)
    assert timeline.peak_live == (1,) * 6


@pytest.mark.parametrize(
    ("engine", "pp", "micro_batches", "stages_per_rank", "message"),
    [
        (
            "interleaved",
            4,
            6,
            2,
            "6 micro-batches is not a multiple of pp=4, which pp_engine interleaved needs; use 4 or 8",
        ),
        ("interleaved", 4, 3, 2, "3 micro-batches is not a multiple of pp=4, which pp_engine interleaved needs; use 4"),
        ("1f1b", 2, 4, 2, "pp_engine 1f1b: 2 stages a rank; use interleaved for more than one"),
        ("2f2b", 2, 4, 1, "pp_engine: '2f2b' is unknown; use afab, 1f1b, interleaved"),
        ("afab", 0, 4, 1, "make_schedule: pp=0, micro_batches=4, stages_per_rank=1; each is 1 or more"),
        ("afab", 2, 0, 1, "make_schedule: pp=2, micro_batches=0, stages_per_rank=1; each is 1 or more"),
        ("afab", 2, 4, 0, "make_schedule: pp=2, micro_batches=4, stages_per_rank=0; each is 1 or more"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    engine: str, pp: int, micro_batches: int, stages_per_rank: int, message: str
) -> None:
    with pytest.raises(ValueError) as error:
        make_schedule(engine, pp=pp, micro_batches=micro_batches, stages_per_rank=stages_per_rank)
    assert str(error.value) == message


@given(st.integers(2, 8), st.integers(1, 40))
def test_the_counts_that_a_refusal_names_fit(pp: int, micro_batches: int) -> None:
    try:
        make_schedule("interleaved", pp=pp, micro_batches=micro_batches, stages_per_rank=2)
    except ValueError as error:
        named = [int(word) for word in str(error).rsplit("use ", 1)[1].split(" or ")]
        assert micro_batches % pp
        assert named == [n for n in (micro_batches // pp * pp, micro_batches // pp * pp + pp) if n]
        for count in named:
            make_schedule("interleaved", pp=pp, micro_batches=count, stages_per_rank=2)
    else:
        assert micro_batches % pp == 0


@given(st.sampled_from(sorted(ENGINES)), st.integers(1, 4), st.integers(1, 9), st.integers(1, 3))
def test_the_config_accepts_what_a_schedule_exists_for(engine: str, pp: int, micro_batches: int, per_rank: int) -> None:
    data = small(
        parallelism={"pp": pp, "pp_engine": engine, "pp_stages_per_rank": per_rank},
        model={"model_config": small()["model"]["model_config"] | {"num_hidden_layers": 12}},
        tokens={"batch_accumulation_per_replica": micro_batches},
    )
    try:
        config_from_dict(data)
    except ConfigError:
        return
    schedule: Schedule = make_schedule(engine, pp=pp, micro_batches=micro_batches, stages_per_rank=per_rank)
    simulate(schedule)
