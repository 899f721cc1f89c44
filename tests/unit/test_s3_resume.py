"""Runs that go on while what they go on from is on its way to an object store, or there already and here no more."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pentode.cli import run_command
from pentode.run.build import Run
from pentode.train import loop, saving
from pentode.train.saving import Saver
from pentode.train.state import TrainState
from tests.helpers.object_store import Bucket, Fault, Proxy, bucket
from tests.unit.test_s3_training import in_s3, local, terminate_when_sent


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket."""
    with bucket(monkeypatch) as made:
        yield made


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are saved from here on."""
    found, real = list[int](), Saver.save

    def save(self: Saver, state: TrainState, *, last: bool = False) -> None:
        found.append(state.step)
        real(self, state, last=last)

    monkeypatch.setattr(saving.Saver, "save", save)
    return found


@pytest.mark.parametrize("fetched", [True, False], ids=["from the store", "from the disk"])
@pytest.mark.parametrize("step", [0, 4])
def test_what_a_run_goes_on_from_is_not_saved_again_when_it_was_sent_and_removed(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch, saves: list[int], step: int, fetched: bool
) -> None:
    """Before the first step its local copy is gone; then a signal asks the run to stop."""
    file = in_s3(tmp_path, store, checkpoints__save_initial_state=True)

    def stop_at_once(run: Run, state: TrainState) -> None:
        if step == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def refused(request: str, _: int) -> Fault | None:
        return Fault(answer=403) if request.startswith("PUT") and not fetched else None

    with Proxy(refused) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setattr(loop, "announce", stop_at_once)
        run_command(["train", str(file), f"tokens.train_steps={max(step, 1)}"])
    assert saves == sorted({0, step})
    assert local(tmp_path) == ([] if fetched else sorted({"0", str(step)}))
    saves.clear()

    monkeypatch.setattr(loop, "announce", lambda run, state: terminate_when_sent(store, tmp_path / "run" / str(step)))
    assert run_command(["train", str(file)]) == 75
    assert saves == []
    assert local(tmp_path) == []
    assert store.published() == sorted({0, step})
