"""Steps that are recorded and replayed are the steps themselves, and are only where they can be."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from pentode.dist.mesh import Axis
from pentode.errors import ConfigError
from pentode.ops import flash, fused_products
from pentode.ops.kernel_package import KernelPackage
from pentode.parallel.batch import Batch
from pentode.run.build import Run
from pentode.train import replay
from pentode.train.replay import TIMED, WARM_UP, Steps
from pentode.train.state import TrainState
from pentode.train.step import StepResult, at_once, train_step
from tests.helpers.masters import weights
from tests.helpers.steps import step_batches, tiny_run
from tests.helpers.tiny import tiny_dict

STEPS = WARM_UP + 4
TOTAL = 1000  # bytes that the GPU played here has


class Watch:
    """A watch that finds what it is told."""

    def __init__(self, milliseconds: float) -> None:
        self.milliseconds, self.marks = milliseconds, 0

    def __len__(self) -> int:
        return self.marks

    def mark(self) -> None:
        self.marks += 1

    def fastest(self) -> float:
        return self.milliseconds


class Recorder:
    """A GPU played by the CPU: a recorded step is not done; replayed, it is done on the tensors it was given."""

    def __init__(self, *, peak: int = 0, free: int = TOTAL) -> None:
        self.replays: list[int] = []  # of each graph
        self.given: Callable[[], None] | None = None
        self.recording = False
        self.devices = SimpleNamespace(
            is_gpu=lambda device: True,
            memory=lambda device: SimpleNamespace(peak_allocated=peak),
            total_memory=lambda device: TOTAL,
            free_memory=lambda device: free,
            Graph=self.graph,
            Watch=self.watch,
        )
        self.speeds: list[float] = [2.0, 1.0]  # milliseconds of a step given anew, and replayed, and so on

    def watch(self, device: torch.device) -> "Watch":
        return Watch(self.speeds.pop(0))

    def train_step(
        self,
        run: Run,
        batches: Sequence[Batch],
        *,
        learning_rate: float | Tensor,
        before_update: Callable[[], object] = at_once,
    ) -> StepResult:
        if not self.recording:
            return train_step(run, batches, learning_rate=learning_rate, before_update=before_update)
        assert before_update is at_once, "a recorded step cannot wait"
        result = StepResult(torch.full((2,), torch.nan, dtype=torch.float64))

        def again() -> None:
            result.numbers.copy_(train_step(run, batches, learning_rate=learning_rate).numbers)

        self.given = again
        return result

    def graph(self) -> SimpleNamespace:
        number, steps = len(self.replays), []
        self.replays.append(0)

        @contextmanager
        def recording() -> Iterator[None]:
            self.recording = True
            yield
            self.recording = False
            steps.append(self.given)

        def again() -> None:
            self.replays[number] += 1
            (step,) = steps
            step()

        return SimpleNamespace(recording=recording, replay=again)


def played(monkeypatch: pytest.MonkeyPatch, *, peak: int = 0, free: int = TOTAL) -> Recorder:
    """Give `train.replay` a GPU, of which a step takes `peak` of TOTAL bytes, and others all but `free`."""
    recorder = Recorder(peak=peak, free=free)
    monkeypatch.setattr(replay, "devices", recorder.devices)
    monkeypatch.setattr(replay, "train_step", recorder.train_step)
    return recorder


def rate(step: int) -> float:
    return 1e-2 / step


def run_of(folder: Path, cuda_graph: Literal["auto", "on", "off"] = "on", **changes: Any) -> Run:
    run = tiny_run(folder, model__dtype="float64", **changes)
    run.config = replace(run.config, model=replace(run.config.model, cuda_graph=cuda_graph))  # refused beside `cpu`
    return run


def batches_of(run: Run, state: TrainState) -> list[Batch]:
    stage = run.feed.stage_at(state.step + 1)
    return run.feed.batches(
        state.step + 1, consumed=state.stage_samples.get(stage.name, 0), first_number=state.consumed_samples
    )


def do(steps: Steps, count: int) -> list[Tensor]:
    """The numbers of the first `count` steps, each taken before the next."""
    numbers = range(1, count + 1)
    return [steps.do(step_batches(steps.run, step), learning_rate=rate(step)).numbers.clone() for step in numbers]


@pytest.mark.parametrize("fused", [True, False])
def test_replayed_steps_are_the_steps_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    recorder = played(monkeypatch)
    changes = {"optimizer__optimizer_factory__torch_adam_is_fused": fused}
    plain, replayed = run_of(tmp_path, "off", **changes), run_of(tmp_path, **changes)
    want = [train_step(plain, step_batches(plain, n), learning_rate=rate(n)) for n in range(1, STEPS + 1)]
    got = do(Steps(replayed), STEPS)
    assert recorder.replays == [STEPS - WARM_UP]
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other.numbers)
    for name, weight in weights(plain.master).items():
        assert torch.equal(weights(replayed.master)[name], weight)


def test_a_recorded_step_has_batches_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played(monkeypatch)
    run = run_of(tmp_path)
    steps, given = Steps(run), [step_batches(run, step) for step in range(1, STEPS + 1)]
    for batches in given:
        steps.do(batches, learning_rate=1e-3)
    for step, batches in enumerate(given, start=1):
        for batch, want in zip(batches, step_batches(run, step), strict=True):
            assert torch.equal(batch.tokens, want.tokens)


def test_each_update_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, run = played(monkeypatch), run_of(tmp_path)
    before: list[tuple[int, float]] = []  # steps replayed, and updates done, when it was waited for
    steps = Steps(run, before_update=lambda: before.append((sum(recorder.replays), run.optimizer.updates.item())))
    do(steps, STEPS)
    assert before == [(max(0, step - WARM_UP), step) for step in range(STEPS)]


def test_another_length_is_recorded_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = played(monkeypatch)
    (first,) = tiny_dict(tmp_path)["data_stages"]
    second = first | {"name": "short", "start_training_step": STEPS, "sequence_length": 8}
    changes = {"data_stages": [first, second], "tokens__train_steps": STEPS + 6}
    plain, replayed = run_of(tmp_path, "off", **changes), run_of(tmp_path, **changes)
    steps, state = Steps(replayed), TrainState()
    for step in range(1, STEPS + 6):
        batches = batches_of(plain, state)
        assert batches[0].sequence_length == (16 if step < STEPS else 8)
        want = train_step(plain, batches, learning_rate=rate(step))
        got = steps.do(batches, learning_rate=rate(step))
        torch.testing.assert_close(got.numbers, want.numbers)
        state.advance(plain)
    assert recorder.replays == [STEPS - 1 - WARM_UP, 6 - WARM_UP]


def test_what_cannot_or_shall_not_be_replayed_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = played(monkeypatch)
    off, checked = run_of(tmp_path, "off"), run_of(tmp_path, "auto", general__ignore_sanity_checks=False)
    same_bits = run_of(tmp_path, "auto")
    general = replace(same_bits.config.general, deterministic=True)
    same_bits.config = replace(same_bits.config, general=general)
    for run in (off, checked, same_bits):
        do(Steps(run), STEPS)
    several = run_of(tmp_path, "auto")
    several.mesh = SimpleNamespace(world=Axis("world", 2, 0))
    steps = Steps(several)
    several.mesh = off.mesh  # the ranks are not there to be summed over
    do(steps, STEPS)
    recorder.devices.is_gpu = lambda device: False
    do(Steps(run_of(tmp_path, "auto")), STEPS)
    assert recorder.replays == []


@pytest.mark.parametrize(
    ("wanted", "peak", "is_recorded"),
    [("auto", TOTAL // 2 - 1, True), ("auto", TOTAL // 2, False), ("on", TOTAL, True)],
)
def test_by_itself_a_step_is_recorded_that_needs_less_than_half_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: Literal["auto", "on"], peak: int, is_recorded: bool
) -> None:
    recorder = played(monkeypatch, peak=peak)
    steps = Steps(run_of(tmp_path, wanted, tokens__train_steps=40))
    do(steps, STEPS + TIMED)
    before = WARM_UP + (TIMED if wanted == "auto" else 0)
    assert recorder.replays == ([STEPS + TIMED - before] if is_recorded else [])


@pytest.mark.parametrize(("replayed", "done"), [(1.9, 12), (2.1, TIMED + 1)])
def test_by_itself_a_recording_is_given_up_that_is_no_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replayed: float, done: int
) -> None:
    recorder = played(monkeypatch)
    recorder.speeds = [2.0, replayed]
    plain, run = run_of(tmp_path, "off", tokens__train_steps=40), run_of(tmp_path, "auto", tokens__train_steps=40)
    count = WARM_UP + TIMED + 12
    do(Steps(plain), count)
    do(Steps(run), count)
    assert recorder.replays == [done]
    for name, weight in weights(plain.master).items():
        assert torch.equal(weights(run.master)[name], weight)


def test_a_step_is_not_recorded_by_itself_where_others_hold_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = played(monkeypatch, peak=TOTAL // 4, free=TOTAL // 4)
    do(Steps(run_of(tmp_path, "auto")), STEPS)
    assert recorder.replays == []


@pytest.mark.parametrize("package", [flash.PACKAGE, fused_products.PACKAGE], ids=lambda package: package.name)
def test_a_step_is_not_recorded_by_itself_where_attention_or_products_are_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: KernelPackage[Any]
) -> None:
    recorder = played(monkeypatch)
    monkeypatch.setattr(package, "is_loaded", lambda device: True)
    do(Steps(run_of(tmp_path, "auto", tokens__train_steps=40)), STEPS + TIMED)
    assert recorder.replays == []


@pytest.mark.parametrize("wanted", ["auto", "on"])
def test_a_step_that_cannot_be_recorded_is_done_unless_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wanted: Literal["auto", "on"]
) -> None:
    recorder = played(monkeypatch)

    @contextmanager
    def recording() -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    recorder.devices.Graph = lambda: SimpleNamespace(recording=recording)
    real = recorder.train_step
    monkeypatch.setattr(
        replay, "train_step", lambda *a, **k: None if isinstance(k["learning_rate"], Tensor) else real(*a, **k)
    )
    plain, run = run_of(tmp_path, "off"), run_of(tmp_path, wanted)
    steps = Steps(run)
    if wanted == "on":
        with pytest.raises(RuntimeError, match="not permitted"):
            do(steps, STEPS)
        return
    do(Steps(plain), STEPS + TIMED)
    do(steps, STEPS + TIMED)
    assert all(
        torch.equal(a, b) for a, b in zip(weights(run.master).values(), weights(plain.master).values(), strict=True)
    )
    assert capsys.readouterr().out.count("a step could not be recorded") == 1


def test_replaying_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model.cuda_graph: on, but torch finds no GPU here; use auto, or off$"):
        Steps(run_of(tmp_path, "on"))
