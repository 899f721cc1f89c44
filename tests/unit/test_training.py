"""Whole runs through the command line, in this process: what is written, resumed, refused, and with which exit code."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pentode.checkpoint.lock import locked
from pentode.cli import run_command
from pentode.parallel.batch import Batch
from pentode.run.build import Run
from pentode.run.feed import Feed
from pentode.train import loop
from pentode.train.journal import Done
from pentode.train.replay import Steps
from pentode.train.state import TrainState
from tests.helpers.tiny import rows, tiny_yaml, weights

CONTRACT = (
    "step lm_loss val_loss grad_norm lr consumed_tokens global_batch_size tokens_per_sec tokens_per_sec_per_gpu "
    "model_tflops_per_gpu elapsed_time_per_iteration_ms cuda_memory_allocated"
).split()


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Do `act` as step `step` begins, once."""
    real, done = loop.one_step, []

    def one_step(run: Run, state: TrainState, steps: Steps) -> Done:
        if state.step + 1 == step and not done:
            done.append(step)
            act()
        return real(run, state, steps)

    monkeypatch.setattr(loop, "one_step", one_step)


def crash() -> None:
    raise RuntimeError("pulled the plug")


def test_a_run_learns_and_leaves_everything_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, run = tiny_yaml(tmp_path, tokens__train_steps=60, tokens__val_check_interval=30), tmp_path / "run"
    assert run_command(["train", str(file)]) == 0
    found = rows(run)
    assert [row["step"] for row in found] == list(range(1, 61))
    assert set(CONTRACT) <= set(found[0])
    assert sum(row["lm_loss"] for row in found[-5:]) < sum(row["lm_loss"] for row in found[:5]) - 2
    assert [row["step"] for row in found if row["val_loss"] is not None] == [30, 60]
    for name in ("4", "60", "report.html", "loss.png", "sample.txt", "logs", "latest.txt"):
        assert (run / name).exists(), name
    output = capsys.readouterr().out
    assert "iteration: 60 / 60 | consumed_tokens: 7.68K" in output
    assert "Sample, going on from" in output


def test_the_same_command_says_that_a_run_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, run = tiny_yaml(tmp_path, tokens__train_steps=4), tmp_path / "run"
    assert run_command(["train", str(file)]) == 0
    before = {path: path.read_bytes() for path in sorted(run.rglob("*.safetensors"))}
    capsys.readouterr()
    assert run_command(["train", str(file)]) == 0
    assert "complete at step 4" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in sorted(run.rglob("*.safetensors"))}


def test_fresh_starts_over_openly(tmp_path: Path) -> None:
    file, run = tiny_yaml(tmp_path, tokens__train_steps=4), tmp_path / "run"
    assert run_command(["train", str(file)]) == 0
    first = weights(run, 4)
    assert run_command(["train", str(file), "general.seed=7", "--fresh"]) == 0
    assert weights(run, 4) != first
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]


def test_a_crashed_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    file = tiny_yaml(tmp_path)
    assert run_command(["train", str(file), f"checkpoints.checkpoints_path={whole}"]) == 0
    for step in (3, 7, 12):
        before_step(monkeypatch, step, crash)
        assert run_command(["train", str(file), f"checkpoints.checkpoints_path={broken}"]) == 70
        monkeypatch.undo()
    assert run_command(["train", str(file), f"checkpoints.checkpoints_path={broken}"]) == 0
    assert weights(broken, 12) == weights(whole, 12)
    for theirs, ours in zip(rows(whole), rows(broken), strict=True):
        same = ("step", "lm_loss", "val_loss", "grad_norm", "lr", "consumed_tokens")
        assert {key: theirs[key] for key in same} == {key: ours[key] for key in same}


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_saves_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str, code: int) -> None:
    file, run = tiny_yaml(tmp_path), tmp_path / "run"
    before_step(monkeypatch, 6, lambda: os.kill(os.getpid(), getattr(signal, number)))
    assert run_command(["train", str(file)]) == code
    monkeypatch.undo()
    assert (run / "6").is_dir()
    assert rows(run)[-1]["step"] == 6
    assert run_command(["train", str(file)]) == 0
    assert [row["step"] for row in rows(run)] == list(range(1, 13))


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_yaml(tmp_path, optimizer__clip_grad=None)
    rate = loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", lambda step, *a, **k: 1e30 if step == 5 else rate(step, *a, **k))
    assert run_command(["train", str(file)]) == 70
    error = capsys.readouterr().err
    assert error.startswith("pentode: step 6: the loss is")
    assert error.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name.isdigit()) == ["4"]


BAD_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "ids beyond the vocabulary": ({"model__model_config__vocab_size": 5}, "beyond the model's vocabulary of 5"),
    "a missing file": ({"data_stages__0__data__dataset": {"text_file": "/nowhere/a.txt"}}, "/nowhere/a.txt"),
    "an empty file": ({"data_stages__0__data__dataset": {"text_file": "/dev/null"}}, "/dev/null"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_one_line_and_65(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    changes, words = BAD_DATA[name]
    assert run_command(["train", str(tiny_yaml(tmp_path, **changes))]) == 65
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_text_shorter_than_a_sample_is_65(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("too short")
    assert run_command(["train", str(tiny_yaml(tmp_path))]) == 65
    assert "needs 17" in capsys.readouterr().err


def test_another_models_checkpoint_is_66(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_yaml(tmp_path, tokens__train_steps=4)
    assert run_command(["train", str(file)]) == 0
    more = ["tokens.train_steps=8"]
    assert run_command(["train", str(file), "model.model_config.n_embd=32", *more]) == 66
    assert "the two models differ" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text((tmp_path / "text.txt").read_text() + " the end")
    assert run_command(["train", str(file), *more]) == 66
    assert "is not what step 4 was trained on" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["tokens.sequence_length=8", "data_stages.0.data.seed=5"])
def test_another_order_of_samples_is_66(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    file = str(tiny_yaml(tmp_path, tokens__train_steps=4))
    assert run_command(["train", file]) == 0
    assert run_command(["train", file, "tokens.train_steps=8", change]) == 66
    assert "is not what step 4 was trained on" in capsys.readouterr().err


def worst(memory: torch.Tensor) -> torch.Tensor:
    """The same with the worst in it that there may be."""
    return memory.fill_(float("nan")) if memory.is_floating_point() else memory


def test_a_padded_vocabulary_survives_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: worst(empty(*a, **k)))
    file = str(tiny_yaml(tmp_path, model__make_vocab_size_divisible_by=64, tokens__val_check_interval=-1))
    assert run_command(["train", file, "tokens.train_steps=4"]) == 0
    assert run_command(["train", file]) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 13))


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tiny_yaml(tmp_path, tokens__train_steps=2))
    with locked(tmp_path / "run"):
        assert run_command(["train", file]) == 74
    assert "another process trains here" in capsys.readouterr().err
    assert run_command(["train", file]) == 0


def test_a_signal_does_not_wait_for_a_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Feed.validation

    def interrupted(self: Feed, step: int) -> Iterator[Batch]:
        for i, batch in enumerate(real(self, step)):
            if i == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            assert i < 2, "the validation went on"
            yield batch

    monkeypatch.setattr(Feed, "validation", interrupted)
    file = str(tiny_yaml(tmp_path, tokens__limit_val_batches=0))
    assert run_command(["train", file]) == 75
    assert rows(tmp_path / "run")[-1]["val_loss"] is None
    monkeypatch.undo()
    assert run_command(["train", file]) == 0


def test_a_signal_while_data_is_opened_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(self: Feed, step: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal was only noted")

    monkeypatch.setattr(Feed, "open", opened)
    assert run_command(["train", str(tiny_yaml(tmp_path))]) == 75


def test_problems_of_a_config_are_64_and_all_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_yaml(tmp_path)
    assert run_command(["train", str(file), "tokens.train_stepz=3", "model.dtype=float3", "general.device=cuda"]) == 64
    error = capsys.readouterr().err
    assert "did you mean train_steps?" in error
    assert "model.dtype" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", str(tiny_yaml(tmp_path)), "general.device=cuda"]) == 64
    assert "use device cpu, or auto" in capsys.readouterr().err


def test_another_run_can_be_the_start(tmp_path: Path) -> None:
    file, first = tiny_yaml(tmp_path), tmp_path / "run"
    assert run_command(["train", str(file)]) == 0
    second = ["train", str(file), f"checkpoints.checkpoints_path={tmp_path / 'second'}"]
    source = f"checkpoints.resume_checkpoint_path={first}"
    assert run_command([*second, source, "tokens.train_steps=14"]) == 0
    assert [row["step"] for row in rows(tmp_path / "second")] == [13, 14]
    third = ["train", str(file), f"checkpoints.checkpoints_path={tmp_path / 'third'}", source]
    assert run_command([*third]) == 64, "it is complete"
    only_weights = ["checkpoints.load_optimizer=false", "checkpoints.load_lr_scheduler=false", "tokens.train_steps=2"]
    assert run_command([*third, *only_weights]) == 0
    found = rows(tmp_path / "third")
    assert [row["step"] for row in found] == [1, 2]
    assert abs(found[0]["lm_loss"] - rows(first)[-1]["lm_loss"]) < 0.2, "it began with trained weights"


def test_stages_follow_each_other_and_survive_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_yaml(tmp_path)
    first = {"dataset": {"text_file": str(tmp_path / "text.txt")}, "validation_fraction": 0.1}
    stages = [
        {"name": "text", "start_training_step": 1, "data": first},
        {"name": "second", "start_training_step": 7, "data": first | {"seed": 5}},
    ]
    second = f"data_stages={json.dumps(stages)}"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_command(["train", str(file), second, f"checkpoints.checkpoints_path={whole}"]) == 0
    before_step(monkeypatch, 10, crash)
    assert run_command(["train", str(file), second, f"checkpoints.checkpoints_path={broken}"]) == 70
    assert run_command(["train", str(file), second, f"checkpoints.checkpoints_path={broken}"]) == 0
    assert weights(whole, 12) == weights(broken, 12)
    state = json.loads((whole / "12" / "state.json").read_text())["train"]
    assert state["stage_samples"] == {"text": 48, "second": 48}


def test_the_initial_state_is_saved_if_asked(tmp_path: Path) -> None:
    file = tiny_yaml(tmp_path, checkpoints__save_initial_state=True, tokens__train_steps=2)
    assert run_command(["train", str(file)]) == 0
    assert (tmp_path / "run" / "0").is_dir()
