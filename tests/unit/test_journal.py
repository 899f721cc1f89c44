"""Records of steps: their speed is that of the stage they belong to, and a bad step hides no good one."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pentode import device as devices
from pentode.cli import run_command
from pentode.data.stages import plan_stages, stage_at
from pentode.device import Fetched
from pentode.errors import NonFiniteError
from pentode.metrics.record import Record
from pentode.metrics.sinks import Sinks
from pentode.train import journal as journals
from pentode.train.journal import Done, Journal
from tests.helpers.tiny import rows, tiny_config, tiny_dict, tiny_yaml

FIRST_LENGTH, NEXT_LENGTH, NEXT_START = 16, 8, 3  # tokens of a sequence, before and from that step on


class Keeper:
    def __init__(self) -> None:
        self.records: list[Record] = []

    def start(self, info: dict[str, object]) -> None: ...

    def log(self, record: Record) -> None:
        self.records.append(record)

    def close(self, status: str) -> None: ...


@dataclass(frozen=True)
class At:
    """A moment in the work of a device, in seconds."""

    seconds: float

    def wait(self) -> None: ...

    def seconds_since(self, earlier: "At") -> float:
        return self.seconds - earlier.seconds


def two_stages(folder: Path) -> list[dict[str, Any]]:
    (first,) = tiny_dict(folder)["data_stages"]
    return [first, first | {"name": "next", "start_training_step": NEXT_START, "sequence_length": NEXT_LENGTH}]


def a_journal(folder: Path, **changes: object) -> tuple[Journal, list[Record]]:
    config = tiny_config(folder, model__model_config__vocab_size=50, data_stages=two_stages(folder), **changes)
    stages = plan_stages(config.data_stages, train_steps=12, sequence_length=FIRST_LENGTH)
    run = SimpleNamespace(
        config=config,
        device=torch.device("cpu"),
        world=SimpleNamespace(size=1),
        feed=SimpleNamespace(stage_at=lambda step: stage_at(stages, step)),
    )
    keeper = Keeper()
    return Journal(run, Sinks([keeper]), folder), keeper.records


def a_step(step: int, *, loss: float = 2.0, norm: float = 1.0) -> Done:
    return Done(step, 1e-3, 128 * step, devices.fetch(torch.tensor([loss, norm])))


def per_step(record: Record, name: str) -> float:
    """What a speed says was done in one step."""
    return getattr(record, name) * record.elapsed_time_per_iteration_ms / 1000


@pytest.mark.parametrize(
    ("steps", "lengths"), [((1, 2), (16, 16)), ((3, 4), (8, 8)), ((1, 2, 3, 4, 5), (16, 16, 8, 8, 8))]
)
def test_speed_is_that_of_the_stages_that_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], lengths: tuple[int, ...]
) -> None:
    monkeypatch.setattr(journals, "peak_flops", lambda name: 1e12)
    journal, records = a_journal(tmp_path)
    config = journal.run.config
    shape, batch = config.model.model_config, config.global_batch_size
    for step in steps:
        journal.add(a_step(step))
    journal.flush()
    flops = batch * sum(shape.flops_per_sequence(length) for length in lengths) / len(steps)
    causal = batch * sum(shape.causal_flops_per_sequence(length) for length in lengths) / len(steps)
    assert [record.step for record in records] == list(steps)
    for record in records:
        assert per_step(record, "tokens_per_sec") == pytest.approx(batch * sum(lengths) / len(steps))
        assert per_step(record, "model_tflops_per_gpu") == pytest.approx(flops / 1e12)
        assert per_step(record, "mfu") == pytest.approx(flops / 1e12)
        assert per_step(record, "mfu_causal") == pytest.approx(causal / 1e12)


@pytest.mark.parametrize("recompute", [False, "selective", True])
def test_blocks_that_run_twice_are_the_hardwares_work_alone(tmp_path: Path, recompute: bool | str) -> None:
    journal, records = a_journal(tmp_path, parallelism__recompute_layer=recompute)
    journal.add(a_step(1))
    journal.flush()
    (record,) = records
    config = journal.run.config
    twice = config.global_batch_size * config.model.model_config.recomputed_flops_per_sequence(FIRST_LENGTH)
    more = per_step(record, "hardware_tflops_per_gpu") - per_step(record, "model_tflops_per_gpu")
    assert more == pytest.approx(twice / 1e12 if recompute is True else 0.0, rel=1e-6)


def test_a_gpus_memory_is_looked_at_once_in_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, records = a_journal(tmp_path)
    journal.meter.start(At(0.0))
    now, seen = [100.0], iter(range(1, 10))
    steps = [replace(a_step(step), numbers=Fetched(torch.ones(2), At(0.0))) for step in range(1, 5)]
    monkeypatch.setattr(journals, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(journals.devices, "is_gpu", lambda device: True)
    monkeypatch.setattr(journals.devices, "memory", lambda device: journals.devices.Memory(next(seen), 0, 0))
    for step in steps:
        journal.add(step)
        journal.flush()
        now[0] += journals.MOMENT * 0.6
    assert [record.cuda_memory_allocated for record in records] == [1, 1, 2, 2]


def test_a_whole_runs_tokens_are_time_times_speed(tmp_path: Path) -> None:
    file = tiny_yaml(tmp_path, tokens__train_steps=4, data_stages=two_stages(tmp_path))
    assert run_command(["train", str(file)]) == 0
    tokens = [row["tokens_per_sec"] * row["elapsed_time_per_iteration_ms"] / 1000 for row in rows(tmp_path / "run")]
    assert tokens == pytest.approx([128, 128, 64, 64])


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"norm": math.inf}])
def test_good_steps_before_a_bad_one_are_written_then_it_is_told(tmp_path: Path, bad: dict[str, float]) -> None:
    journal, records = a_journal(tmp_path)
    for done in (a_step(1, loss=3.0), a_step(2, loss=2.5), a_step(3, **bad), a_step(4)):
        journal.add(done)
    for _ in range(2):  # whoever asks again is told again, and nothing is written twice
        with pytest.raises(NonFiniteError, match=r"^step 3: "):
            journal.flush(val_loss=9.0)
        assert [(r.step, r.lm_loss, r.val_loss, r.consumed_tokens) for r in records] == [
            (1, 3.0, None, 128),
            (2, 2.5, None, 256),
        ]


def test_a_flush_whose_first_step_is_bad_writes_nothing(tmp_path: Path) -> None:
    journal, records = a_journal(tmp_path)
    journal.add(a_step(1, loss=math.nan))
    with pytest.raises(NonFiniteError, match=r"^step 1: "):
        journal.flush()
    assert records == []


def test_only_the_last_record_of_a_flush_has_its_validation_loss(tmp_path: Path) -> None:
    journal, records = a_journal(tmp_path)
    journal.add(a_step(1))
    journal.add(a_step(2))
    journal.flush(val_loss=4.0)
    journal.flush()
    assert [(r.step, r.val_loss) for r in records] == [(1, None), (2, 4.0)]


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that works beside the host."""
    played = SimpleNamespace(**vars(devices) | {"is_gpu": lambda device: True, "name": lambda device: "cpu"})
    monkeypatch.setattr(journals, "devices", played)


def test_what_is_wanted_of_a_device_beside_the_host_is_written_under_the_next_step(
    tmp_path: Path, beside: None
) -> None:
    journal, records = a_journal(tmp_path)
    journal.add(a_step(1))
    journal.add(a_step(2))
    assert records == []
    journal.want()
    assert records == []
    journal.add(a_step(3))
    assert [r.step for r in records] == [1, 2]
    journal.add(a_step(4))  # nothing was wanted since
    assert [r.step for r in records] == [1, 2]
    journal.want()
    journal.flush(val_loss=4.0)
    assert [(r.step, r.val_loss) for r in records] == [(1, None), (2, None), (3, None), (4, 4.0)]
    journal.add(a_step(5))  # what was wanted is written
    journal.flush()
    journal.flush()
    assert [r.step for r in records] == [1, 2, 3, 4, 5]


def test_all_steps_of_a_device_beside_the_host_have_its_time_the_last_too(tmp_path: Path, beside: None) -> None:
    """The last record is written when its step is done, those before it under the next step, when that was given."""
    journal, records = a_journal(tmp_path)
    journal.meter.start(At(0.0))
    for step in (1, 2, 3):
        journal.add(replace(a_step(step), numbers=Fetched(torch.ones(2), At(float(step)))))
        journal.want()
    journal.flush()
    assert [record.elapsed_time_per_iteration_ms for record in records] == pytest.approx([1000, 1000, 1000])


def test_what_is_wanted_of_the_host_itself_is_written_at_once(tmp_path: Path) -> None:
    journal, records = a_journal(tmp_path)
    journal.add(a_step(1))
    journal.want()
    assert [r.step for r in records] == [1]


def test_a_bad_step_of_a_device_beside_the_host_is_told_one_step_later(tmp_path: Path, beside: None) -> None:
    journal, records = a_journal(tmp_path)
    for step in (1, 2):
        journal.add(a_step(step))
        journal.want()
    journal.add(a_step(3, loss=math.nan))
    journal.want()
    assert [r.step for r in records] == [1, 2]
    with pytest.raises(NonFiniteError, match=r"^step 3: "):
        journal.add(a_step(4, loss=math.nan))
    with pytest.raises(NonFiniteError, match=r"^step 3: "):
        journal.flush()
    assert [r.step for r in records] == [1, 2]


def test_speed_under_the_next_step_is_that_of_the_steps_written(tmp_path: Path, beside: None) -> None:
    journal, records = a_journal(tmp_path)
    for step in (1, 2, 3):  # the third is of a stage with shorter sequences
        if step == 3:
            journal.want()
        journal.add(a_step(step))
    assert per_step(records[-1], "tokens_per_sec") == pytest.approx(journal.run.config.global_batch_size * FIRST_LENGTH)


def test_records_that_wait_are_written_when_the_next_step_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, records = a_journal(tmp_path)
    journal.add(a_step(1))
    with monkeypatch.context() as patched:
        patched.setattr(journals.devices, "is_gpu", lambda device: True)
        journal.want()
    with pytest.raises(KeyboardInterrupt), journal.kept_if_this_fails():
        raise KeyboardInterrupt
    assert [record.step for record in records] == [1]
