"""Which stage a step belongs to, what is left of it, and what it has consumed."""

from hypothesis import given
from hypothesis import strategies as st

from pentode.config.schema import DataArgs, DatasetStageArgs
from pentode.data.stages import plan_stages, stage_at


def stage_args(name: str, start: int, sequence_length: int | None = None) -> DatasetStageArgs:
    data = DataArgs(dataset=None)
    return DatasetStageArgs(name=name, start_training_step=start, data=data, sequence_length=sequence_length)


def test_the_tutorials_two_stages() -> None:
    stages = plan_stages(
        [stage_args("Stable Training Stage", 1), stage_args("Annealing Phase", 10, 512)],
        train_steps=15,
        sequence_length=256,
    )
    assert [stage.remaining(0) for stage in stages] == [9, 6]  # Nanotron printed 5 for the last: one too few
    assert [stage.sequence_length for stage in stages] == [256, 512]
    assert [stage_at(stages, step).name for step in (1, 9, 10, 15)] == 2 * [stages[0].name] + 2 * [stages[1].name]
    assert [stage.remaining(12) for stage in stages] == [0, 3]
    assert [stage.consumed(12, global_batch=2) for stage in stages] == [18, 6]


@given(starts=st.sets(st.integers(2, 60), max_size=5), train_steps=st.integers(1, 50), data=st.data())
def test_every_step_is_in_one_stage_and_counted_once(starts: set[int], train_steps: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations([1, *starts]))
    stages = plan_stages([stage_args(str(s), s) for s in order], train_steps=train_steps, sequence_length=8)
    done = data.draw(st.integers(0, train_steps))
    consumed, remaining = dict.fromkeys(range(len(stages)), 0), dict.fromkeys(range(len(stages)), 0)
    for step in range(1, train_steps + 1):
        stage = stage_at(stages, step)
        assert order[stage.index] == max(s for s in order if s <= step)
        (consumed if step <= done else remaining)[stage.index] += 1
    assert {stage.index: stage.remaining(done) for stage in stages} == remaining
    assert {stage.index: stage.consumed(done, global_batch=3) // 3 for stage in stages} == consumed
