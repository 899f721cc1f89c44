"""Saves that are given up because the training beside them has ended: nothing of them appears, and why is told."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pentode.checkpoint import storage
from pentode.checkpoint.background import Background
from pentode.checkpoint.layout import Saved
from pentode.checkpoint.save import save
from pentode.dist.board import Cancelled
from pentode.train import saving
from pentode.train.saving import Saver
from pentode.train.signals import StopSignal
from pentode.train.state import TrainState
from tests.helpers.faulty_os import FaultyOs
from tests.helpers.steps import tiny_run

PATIENCE = 60.0


class StuckOs:
    """`os` with a disk that takes its time: the last fsync before a checkpoint gets its name waits for `go_on`."""

    def __init__(self) -> None:
        self.stuck, self.go_on = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, file: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{file}")).name.startswith(".tmp-"):
            self.stuck.set()
            assert self.go_on.wait(PATIENCE)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[StuckOs]:
    """A disk that is stuck until a test lets it go on."""
    found = StuckOs()
    monkeypatch.setattr(storage, "os", found)
    yield found
    found.go_on.set()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings."""
    found: list[str] = []
    monkeypatch.setattr(saving.log, "warning", found.append)
    monkeypatch.setattr(saving, "ENDING", 0.01)
    return found


def write(root: Path, value: float, cancelled: threading.Event | None = None) -> None:
    save(root, step=1, groups={"weights": {"w": Saved.whole(torch.tensor(value))}}, state={}, cancelled=cancelled)


@pytest.mark.parametrize("is_there", [False, True])
def test_what_was_given_up_does_not_appear_when_the_disk_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    if is_there:
        write(tmp_path, 1.0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    stuck, background = StuckOs(), Background()
    monkeypatch.setattr(storage, "os", stuck)
    background.start(lambda: write(tmp_path, 2.0, background.cancelled))
    assert stuck.stuck.wait(PATIENCE)
    background.cancelled.set()
    stuck.go_on.set()
    with pytest.raises(Cancelled):
        background.wait()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob(".*"))


def test_a_process_that_goes_on_after_a_run_sees_no_checkpoint_of_it_appear(
    tmp_path: Path, stuck: StuckOs, told: list[str]
) -> None:
    run, root = tiny_run(tmp_path), tmp_path / "run"
    saver = Saver(run, root, StopSignal(run.device))

    def begins_to_save() -> None:
        with saver:
            saver.save(TrainState(step=4))
            assert stuck.stuck.wait(PATIENCE)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begins_to_save()
    assert told == [f"{root}/4: this checkpoint was given up; those before it stay"]
    stuck.go_on.set()
    assert saver._background.is_done(within=PATIENCE)
    assert isinstance(saver._background.error, Cancelled)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("disk", [True, False], ids=["disk", "bug"])
def test_a_save_that_failed_beside_a_training_that_failed_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str], disk: bool
) -> None:
    run, root = tiny_run(tmp_path), tmp_path / "run"

    def broken(root: Path, **content: object) -> Path:
        raise RuntimeError("bits fell out")

    if disk:
        monkeypatch.setattr(storage, "os", FaultyOs(fail_at=2, code=errno.ENOSPC))
    else:
        monkeypatch.setattr(saving, "save", broken)

    def fails() -> None:
        with Saver(run, root, StopSignal(run.device)) as saver:
            saver.save(TrainState(step=4))
            assert saver._background.is_done(within=PATIENCE)
            raise ValueError("training")

    with pytest.raises(ValueError, match="training"):
        fails()
    (line,) = told
    assert line.startswith(f"{root}/4: this checkpoint was given up (")
    assert line.endswith("); those before it stay")
    assert (": the disk is full (" if disk else "(RuntimeError: bits fell out)") in line
