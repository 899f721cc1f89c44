"""What a run checks before it saves, and how it ends when it cannot: room on the disk, time after a signal, damage."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pentode import device as devices
from pentode.checkpoint.background import HostCache
from pentode.checkpoint.folder import newest, open_checkpoint
from pentode.checkpoint.save import save, size_of
from pentode.cli import run_command
from pentode.config.schema import DataStatesArgs
from pentode.train import loop, saving
from pentode.train.saving import MARGIN, DeviceRoom, host_cache, saves_to_come
from pentode.train.signals import StopSignal
from pentode.train.state import TrainState, content
from tests.helpers.kill_run import Command, exit_code
from tests.helpers.steps import tiny_run
from tests.helpers.tiny import tiny_config, tiny_yaml

CPU = torch.device("cpu")
GIB = 2**30
BIGGER = {"model__model_config__n_embd": 32}
SIZES: list[dict[str, Any]] = [
    BIGGER,
    BIGGER | {"model__dtype": "bfloat16"},
    BIGGER | {"model__dtype": "float64", "model__model_config__n_layer": 4},
    BIGGER | {"optimizer__optimizer_factory": {"name": "sgd"}},
    BIGGER | {"optimizer__optimizer_factory": {"name": "sgd"}, "model__dtype": "bfloat16"},
    {"model__model_config__n_embd": 64, "model__make_vocab_size_divisible_by": 64},
]


@pytest.mark.parametrize("changes", SIZES, ids=str)
def test_the_size_of_a_checkpoint_is_known_before(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = tiny_run(tmp_path, **changes)
    what = content(run, TrainState())
    folder = save(tmp_path / "run", **what)
    actual = sum(path.stat().st_size for path in folder.iterdir())
    assert size_of(what["groups"], what["files"]) == pytest.approx(actual, rel=0.02)


def test_a_disk_without_room_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tiny_yaml(tmp_path, general__run="room"))
    run = tiny_run(tmp_path)
    size = size_of(*(content(run, TrainState())[key] for key in ("groups", "files")))
    free = [0]
    real = shutil.disk_usage
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: real(path)._replace(free=free[0]))
    free[0] = int(2.5 * size)
    assert run_command(["train", file, "checkpoints.keep_last=2"]) == 74
    error = capsys.readouterr().err
    assert "3 more of which must fit at a time" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert run_command(["train", file, "tokens.train_steps=4"]) == 0
    assert run_command(["train", file, "tokens.train_steps=8", "checkpoints.keep_last=2"]) == 0, "one is there already"
    free[0] = 0
    assert run_command(["train", file]) == 74
    assert run_command(["train", file, "checkpoints.check_free_space=false"]) == 0


def test_a_disk_that_will_be_full_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = size_of(*(content(tiny_run(tmp_path), TrainState())[key] for key in ("groups", "files")))
    real = shutil.disk_usage
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: real(path)._replace(free=int(2.5 * size)))
    assert run_command(["train", str(tiny_yaml(tmp_path))]) == 0
    assert "of 3 checkpoints to come 2 fit on the disk; set keep_last" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "step", "count"),
    [({}, 0, 3), ({}, 4, 2), ({}, 12, 0), ({"checkpoints__checkpoint_interval": 5}, 0, 3)],
)
def test_the_saves_to_come_are_counted(tmp_path: Path, changes: dict[str, Any], step: int, count: int) -> None:
    assert saves_to_come(tiny_config(tmp_path, **changes), step) == count


def test_a_damaged_newest_checkpoint_stops_a_run_that_asks_for_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tiny_yaml(tmp_path, tokens__train_steps=8))
    assert run_command(["train", file]) == 0
    (tmp_path / "run" / "8" / "config.yaml").write_text("other")
    capsys.readouterr()
    assert run_command(["train", file, "checkpoints.on_corrupt=stop"]) == 66
    error = capsys.readouterr().err
    assert "config.yaml" in error
    assert "set checkpoints.on_corrupt to fallback" in error
    assert error.count("\n") == 1
    assert (tmp_path / "run" / "8").is_dir()
    assert run_command(["train", file]) == 0
    open_checkpoint(tmp_path / "run" / "8").verify()
    assert len(list((tmp_path / "run").glob(".bad-8-*"))) == 1


def never_saved(*arguments: str) -> None:
    """`python -m pentode`, in which the second save never ends and SIGTERM comes at step 6."""
    from pentode.cli import main

    real_save, real_step = saving.save, loop.one_step

    def stuck(root: Path, *, step: int, **content: Any) -> Path:
        if step > 4:
            threading.Event().wait()
        return real_save(root, step=step, **content)

    def one_step(run: Any, state: TrainState, steps: Any) -> Any:
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(run, state, steps)

    saving.save, loop.one_step = stuck, one_step
    main(list(arguments))


def test_a_signal_that_is_noticed_when_the_run_is_left_sets_no_limit() -> None:
    with StopSignal(CPU, grace_s=0.1) as stop:
        pass
    stop._begin_grace(signal.SIGTERM)
    assert stop._limit is None


@pytest.mark.parametrize("engine", ["async", "torch"])
def test_a_save_that_never_ends_does_not_hold_up_the_end(tmp_path: Path, engine: str) -> None:
    file = str(tiny_yaml(tmp_path, checkpoints__grace_s=0.5, checkpoints__checkpointing_engine=engine))
    command = Command(never_saved, lambda root: ["train", file, f"checkpoints.checkpoints_path={root}"])
    code = exit_code(command.start(tmp_path / "stuck"))
    printed = (tmp_path / "stuck.log").read_text()
    assert code == 75, printed
    assert "SIGTERM: not saved within checkpoints.grace_s=0.5 s" in printed
    found = newest(tmp_path / "stuck")
    assert found is not None
    assert found.step == 4


def test_a_save_that_will_take_too_long_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = loop.one_step

    def one_step(run: Any, state: TrainState, steps: Any) -> Any:
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, state, steps)

    clock: Iterator[float] = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(loop, "one_step", one_step)
    assert run_command(["train", str(tiny_yaml(tmp_path))]) == 75
    assert "saving took 1000 s the last time, more than the 60 s that there are" in capsys.readouterr().out


def test_datastates_bounds_the_memory_of_the_host(tmp_path: Path) -> None:
    def cache(**changes: Any) -> HostCache:
        return host_cache(tiny_config(tmp_path, **changes).checkpoints, CPU)

    assert cache()._left is None
    bounded = {"checkpoints__checkpointing_engine": "datastates"}
    assert cache(**bounded)._left == 16 * GIB // 2**26
    options = cache(**bounded, checkpoints__datastates={"host_cache_size": 2, "pin_host_cache": False})
    assert (options._left, options.pinned) == (2 * GIB // 2**26, False)
    assert DataStatesArgs(host_cache_size=1).pin_host_cache


def test_a_snapshot_is_staged_where_it_fits_beside_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    peak, room, resets = [500], {"total": 1000}, []
    monkeypatch.setattr(
        saving,
        "devices",
        SimpleNamespace(
            is_gpu=lambda device: True,
            memory=lambda device: SimpleNamespace(peak_allocated=peak[0]),
            room_beside=lambda used, device: room["total"] - used,
            reset_peak_memory=resets.append,
            total_memory=lambda device: room["total"],
        ),
    )
    fits = int(500 - MARGIN * 1000)
    one = DeviceRoom(CPU)
    one.step_done()
    assert not one.has(1), "no whole step has shown what it needs"
    one.step_done()
    assert not one.has(fits + 1)
    assert one.has(fits)
    one.given_back()
    assert resets == [CPU]
    peak[0] = 501
    one.step_done()
    assert one.has(fits), "that step was not seen whole: what is known counts"
    one.step_done()
    assert not one.has(fits), "steps need more than they did"
    peak[0] = 400
    one.given_back()
    assert not one.has(fits), "they may need it again"
    other = DeviceRoom(CPU)
    other.step_done()
    other.step_done()
    other.refuse()
    assert not other.has(1)
    monkeypatch.setattr(saving, "devices", devices)
    assert not DeviceRoom(CPU).has(0)
