"""Old checkpoints go only when a newer one was read again and is right, and whole or not at all."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pentode.checkpoint import storage
from pentode.checkpoint.folder import newest
from pentode.checkpoint.keep import prune, to_remove
from pentode.checkpoint.layout import Saved
from pentode.checkpoint.save import clean, save
from pentode.cli import run_command
from tests.helpers.faulty_os import Crash, FaultyOs
from tests.helpers.tiny import tiny_yaml


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "os", FaultyOs())


def write(root: Path, *steps: int) -> None:
    for step in steps:
        groups = {"weights": {"w": Saved.whole(torch.full((4,), float(step)))}}
        save(root, step=step, groups=groups, state={}, files={"config.yaml": b"{}\n"})


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@given(steps=st.sets(st.integers(0, 30)), keep_last=st.integers(1, 5), keep_every=st.none() | st.integers(1, 6))
def test_the_newest_and_the_chosen_ones_stay(steps: set[int], keep_last: int, keep_every: int | None) -> None:
    gone = to_remove(list(steps), keep_last=keep_last, keep_every=keep_every)
    kept = steps.difference(gone)
    assert set(gone) <= steps
    assert set(sorted(steps)[-keep_last:]) <= kept
    for step in kept - set(sorted(steps)[-keep_last:]):
        assert keep_every is not None
        assert step % keep_every == 0
    assert all(keep_every is None or step % keep_every for step in gone)


def test_what_is_no_complete_checkpoint_is_neither_counted_nor_touched(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4, 5)
    (tmp_path / "2024").mkdir()  # somebody's photos
    (tmp_path / "4" / "config.yaml").unlink()
    prune(tmp_path, 5, keep_last=2, keep_every=None)
    assert names(tmp_path) == ["2024", "3", "4", "5", "latest.txt"]


def test_nothing_goes_while_the_newest_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 1, 2, 3)
    weights = tmp_path / "3" / "weights-00000-of-00001.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    prune(tmp_path, 3, keep_last=1, keep_every=None)
    assert names(tmp_path) == ["1", "2", "3", "latest.txt"]
    assert "its checksum is wrong; no older checkpoint is removed" in capsys.readouterr().out


def test_a_crash_at_any_call_leaves_each_checkpoint_whole_or_gone(tmp_path: Path) -> None:
    call = 0
    while True:
        root = tmp_path / str(call)
        write(root, 1, 2, 3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "os", FaultyOs(fail_at=call))
            try:
                prune(root, 3, keep_last=1, keep_every=None)
                break
            except Crash:
                pass
        clean(root)
        found = newest(root)
        assert found is not None
        assert found.step == 3
        for name in names(root):
            assert name == "latest.txt" or (root / name / "manifest.json").is_file(), name
        call += 1
    assert call > 10
    assert names(root) == ["3", "latest.txt"]


@pytest.mark.parametrize("engine", ["async", "torch"])
def test_a_run_keeps_what_it_is_told_to(tmp_path: Path, engine: str) -> None:
    file = str(tiny_yaml(tmp_path, checkpoints__checkpoint_interval=2, checkpoints__checkpointing_engine=engine))
    assert run_command(["train", file, "checkpoints.keep_last=2", "checkpoints.keep_every=6"]) == 0
    assert sorted(int(path.name) for path in (tmp_path / "run").iterdir() if path.name.isdigit()) == [6, 10, 12]
    assert [path.name for path in (tmp_path / "run").glob(".trash*")] == []
