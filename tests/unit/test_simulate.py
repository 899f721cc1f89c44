"""The simulator refuses schedules that are wrong, and the messages it inserts arrive in the order they were sent."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pentode.parallel.pipeline.schedules import ENGINES, Action, Schedule, forward_only, make_schedule
from pentode.parallel.pipeline.simulate import Transfer, needed, simulate, with_transfers

Step = Action | Transfer
Name = tuple[str, int, int]  # of what a message carries


def F(stage: int, micro_batch: int) -> Action:
    return Action("F", stage, micro_batch)


def B(stage: int, micro_batch: int) -> Action:
    return Action("B", stage, micro_batch)


def schedule_of(*programs: list[Action], placement: tuple[int, ...] | None = None) -> Schedule:
    """A schedule by hand; without placement, stage s is on rank s."""
    return Schedule("by hand", placement or tuple(range(len(programs))), tuple(map(tuple, programs)))


def refusal(schedule: Schedule) -> str:
    """What the simulator says against a schedule."""
    with pytest.raises(RuntimeError) as error:
        simulate(schedule)
    return str(error.value)


FIRST, LAST = [F(0, 0), F(0, 1), B(0, 0), B(0, 1)], [F(1, 0), B(1, 0), F(1, 1), B(1, 1)]


def test_a_schedule_by_hand_is_timed() -> None:
    timeline = simulate(schedule_of(FIRST, LAST))
    assert timeline.spans[F(0, 1)] == (1, 2)
    assert timeline.spans[B(1, 0)] == (2, 4)
    assert timeline.spans[B(0, 0)] == (4, 6)
    assert timeline.spans[B(0, 1)] == (7, 9)
    assert timeline.makespan == 9
    assert timeline.bubble == pytest.approx(1 - 12 / 18)
    assert timeline.peak_live == (2, 1)


def test_stages_may_cost_unlike() -> None:
    timeline = simulate(schedule_of(FIRST, LAST), stage_costs=[1, 3])
    assert timeline.spans[F(1, 0)] == (1, 4)
    assert timeline.spans[B(1, 1)] == (13, 19)
    assert timeline.makespan == 21
    assert timeline.bubble == pytest.approx(1 - (6 + 18) / 42)


@pytest.mark.parametrize("lost", [*FIRST, *LAST], ids=str)
def test_a_missing_action_is_refused(lost: Action) -> None:
    programs = [[action for action in program if action != lost] for program in (FIRST, LAST)]
    assert refusal(schedule_of(*programs)) == f"pipeline schedule lacks {lost}"


def test_a_backward_that_no_stage_does_is_refused() -> None:
    programs = [[action for action in program if action[::2] != ("B", 1)] for program in (FIRST, LAST)]
    assert refusal(schedule_of(*programs)) == "pipeline schedule lacks B1@0"


def test_a_micro_batch_that_is_left_out_is_refused() -> None:
    programs = [[action for action in program if action.micro_batch != 0] for program in (FIRST, LAST)]
    assert refusal(schedule_of(*programs)) == "pipeline schedule lacks B0@0"


def test_a_stage_that_nobody_runs_is_refused() -> None:
    assert refusal(schedule_of(FIRST, LAST, placement=(0, 1, 1))) == "pipeline schedule lacks B0@2"


@pytest.mark.parametrize("twice", LAST, ids=str)
def test_an_action_done_twice_is_refused(twice: Action) -> None:
    assert refusal(schedule_of(FIRST, [*LAST, twice])) == f"pipeline schedule does {twice} twice"


def test_an_action_on_a_wrong_rank_is_refused() -> None:
    assert (
        refusal(schedule_of(FIRST[1:], [F(0, 0), *LAST]))
        == "pipeline schedule has F0@0 on rank 1, which does not hold that stage"
    )


@pytest.mark.parametrize("stage", [-1, 2])
def test_an_action_of_no_stage_is_refused(stage: int) -> None:
    assert (
        refusal(schedule_of(FIRST, [*LAST, F(stage, 0)]))
        == f"pipeline schedule has F0@{stage} on rank 1, which does not hold that stage"
    )


def test_a_deadlock_is_refused_with_what_each_rank_waits_at() -> None:
    first = [F(0, 0), B(0, 0), F(0, 1), B(0, 1)]
    last = [F(1, 0), F(1, 1), B(1, 0), B(1, 1)]
    assert (
        refusal(schedule_of(first, last)) == "pipeline schedule deadlocks: rank 0 waits at B0@0, rank 1 waits at F1@1"
    )


def test_a_backward_before_its_forward_is_a_deadlock_of_one_rank() -> None:
    assert refusal(schedule_of([B(0, 0), F(0, 0)])) == "pipeline schedule deadlocks: rank 0 waits at B0@0"


def test_the_messages_of_a_schedule_by_hand() -> None:
    first, last = with_transfers(schedule_of(FIRST, LAST))
    assert ", ".join(map(str, first)) == (
        "F0@0, SEND activation0@0 to 1, POST gradient0@1 from 1, F1@0, SEND activation1@0 to 1, "
        "POST gradient1@1 from 1, B0@0, B1@0"
    )
    assert ", ".join(map(str, last)) == (
        "POST activation0@0 from 0, F0@1, POST activation1@0 from 0, B0@1, SEND gradient0@1 to 0, F1@1, B1@1, "
        "SEND gradient1@1 to 0"
    )


@st.composite
def any_schedules(draw: st.DrawFn) -> Schedule:
    """A valid schedule nobody would write: stages on any ranks, and actions in any order that needs allow."""
    stages, micro_batches = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    ranks = draw(st.integers(1, 3))
    placement = tuple(draw(st.lists(st.integers(0, ranks - 1), min_size=stages, max_size=stages)))
    empty = Schedule("drawn", placement, ((),) * ranks)
    kinds = "FB" if draw(st.booleans()) else "F"
    left = [Action(kind, s, i) for kind in kinds for s in range(stages) for i in range(micro_batches)]
    done: list[Action] = []
    while left:
        ready = [action for action in left if all(need in done for need in needed(action, empty))]
        action = draw(st.sampled_from(ready))
        left.remove(action)
        done.append(action)
    programs = (tuple(action for action in done if placement[action.stage] == rank) for rank in range(ranks))
    return Schedule("drawn", placement, tuple(programs))


@st.composite
def engine_schedules(draw: st.DrawFn) -> Schedule:
    """Any schedule that a config can ask for, or forwards alone."""
    engine, pp = draw(st.sampled_from([*sorted(ENGINES), "forward"])), draw(st.integers(1, 6))
    per_rank = 1 if engine == "1f1b" else draw(st.integers(1, 3))
    micro_batches = draw(st.integers(1, 13))
    if engine == "forward":
        return forward_only([stage % pp for stage in range(pp * per_rank)], micro_batches=micro_batches)
    if engine == "interleaved":
        micro_batches = pp * draw(st.integers(1, 3))
    return make_schedule(engine, pp=pp, micro_batches=micro_batches, stages_per_rank=per_rank)


schedules = any_schedules() | engine_schedules()


def name(step: Step) -> Name:
    """Of an action's result, or of what a message carries: what it is, the stage that made it, the micro-batch."""
    if isinstance(step, Transfer):
        return step.what, step.stage, step.micro_batch
    return "activation" if step.kind == "F" else "gradient", step.stage, step.micro_batch


def messages(program: tuple[Step, ...], kind: str, peer: int) -> list[Name]:
    """What a rank sends to a peer, or begins to receive from it, in order."""
    return [name(step) for step in program if isinstance(step, Transfer) and step[0] == kind and step.peer == peer]


@given(schedules)
def test_any_valid_schedule_passes(schedule: Schedule) -> None:
    timeline = simulate(schedule)
    for action, (start, _) in timeline.spans.items():
        assert all(timeline.spans[need][1] <= start for need in needed(action, schedule))


@given(schedules)
def test_transfers_leave_the_actions_as_they_are(schedule: Schedule) -> None:
    for program, full in zip(schedule.programs, with_transfers(schedule), strict=True):
        assert tuple(step for step in full if isinstance(step, Action)) == program


@given(schedules)
def test_receives_are_begun_in_the_order_of_the_sends(schedule: Schedule) -> None:
    programs = with_transfers(schedule)
    for source, sender in enumerate(programs):
        for target, receiver in enumerate(programs):
            assert messages(sender, "SEND", target) == messages(receiver, "POST", source)


@given(schedules)
def test_every_receive_is_begun_before_its_use_and_every_result_sent_after_it_is_made(schedule: Schedule) -> None:
    for rank, program in enumerate(with_transfers(schedule)):
        posted: set[Name] = set()
        for before, step in zip((None, *program), program, strict=False):
            if isinstance(step, Action):
                away = [need for need in needed(step, schedule) if schedule.placement[need.stage] != rank]
                assert {name(need) for need in away} <= posted
            elif step.kind == "POST":
                assert name(step) not in posted
                posted.add(name(step))
            else:
                assert isinstance(before, Action)
                assert name(before) == name(step)


@given(schedules)
def test_a_message_goes_exactly_where_a_result_changes_ranks(schedule: Schedule) -> None:
    want = Counter(
        (schedule.placement[need.stage], rank, *name(need))
        for rank, program in enumerate(schedule.programs)
        for action in program
        for need in needed(action, schedule)
        if schedule.placement[need.stage] != rank
    )
    got = Counter(
        (rank, step.peer, *name(step))
        for rank, program in enumerate(with_transfers(schedule))
        for step in program
        if isinstance(step, Transfer) and step.kind == "SEND"
    )
    assert got == want


@pytest.mark.parametrize("engine", ENGINES)
def test_one_rank_sends_nothing(engine: str) -> None:
    schedule = make_schedule(engine, pp=1, micro_batches=3)
    assert with_transfers(schedule) == schedule.programs


def test_stages_beside_each_other_on_one_rank_send_nothing_between_them() -> None:
    programs = with_transfers(forward_only((0, 0, 1), micro_batches=1))
    assert [list(map(str, program)) for program in programs] == [
        ["F0@0", "F0@1", "SEND activation0@1 to 1"],
        ["POST activation0@1 from 0", "F0@2"],
    ]


@given(schedules)
def test_on_channels_first_in_first_out_every_action_gets_what_it_needs(schedule: Schedule) -> None:
    programs = with_transfers(schedule)
    underway = {(a, b): list[Name]() for a in range(len(programs)) for b in range(len(programs))}
    awaited = {channel: list[Name]() for channel in underway}
    there: list[set[Name]] = [set() for _ in programs]
    left = [list(program) for program in programs]
    while any(left):
        moved = False
        for rank, program in enumerate(left):
            while program:
                step = program[0]
                if isinstance(step, Action):
                    for source in range(len(programs)):
                        while underway[source, rank] and awaited[source, rank]:
                            assert underway[source, rank][0] == awaited[source, rank].pop(0)
                            there[rank].add(underway[source, rank].pop(0))
                    if not {name(need) for need in needed(step, schedule)} <= there[rank]:
                        break
                    there[rank].add(name(step))
                elif step.kind == "SEND":
                    underway[rank, step.peer].append(name(step))
                else:
                    awaited[step.peer, rank].append(name(step))
                program.pop(0)
                moved = True
        assert moved, "all ranks wait"
    assert not any(underway.values())
    assert not any(awaited.values())
