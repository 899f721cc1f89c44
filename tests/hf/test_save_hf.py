"""`checkpoints.save_hf`: a folder for Hugging Face beside each checkpoint; no step waits for it, no run ends by it."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from pentode.checkpoint import storage
from pentode.cli import run_command
from pentode.config.load import load_config
from pentode.convert import beside
from pentode.convert.beside import HFFolders
from pentode.errors import StorageError
from pentode.train import loop, saving
from pentode.train.start import start
from tests.helpers.hf_models import assert_equal, ours
from tests.helpers.tiny import tiny_yaml

QUICK = {"tokens__train_steps": 4, "checkpoints__checkpoint_interval": 2, "tokens__val_check_interval": -1}
WRITES = "import os, sys; os.mkdir(sys.argv[2])"
FAILS = "import sys; sys.exit('first line\\nmodel.safetensors: the disk is full')"
# Begins as a conversion does, says so in one pipe, and ends when told to in the other.
WAITS = """
import os, sys
folder, step = os.path.split(sys.argv[2])
os.mkdir(os.path.join(folder, f".tmp-{step}-00000000"))
open(os.environ["BEGUN"], "w").close()
open(os.environ["MAY_END"]).close()
os.rename(os.path.join(folder, f".tmp-{step}-00000000"), sys.argv[2])
"""


@pytest.fixture(autouse=True)
def no_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


def converting_by(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a short program stand for the conversion."""
    monkeypatch.setattr(beside, "CONVERT", [sys.executable, "-I", "-c", code])


@pytest.fixture
def pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """For WAITS: the pipe in which it says that it has begun, and that in which it hears that it may end."""
    begun, may_end = tmp_path / "begun", tmp_path / "may_end"
    for name, path in (("BEGUN", begun), ("MAY_END", may_end)):
        os.mkfifo(path)
        monkeypatch.setenv(name, str(path))
    return begun, may_end


def config(folder: Path, **changes: Any) -> str:
    return str(tiny_yaml(folder, **QUICK | changes, checkpoints__save_hf=True))


def checkpoints(root: Path, *steps: int) -> None:
    """What looks like checkpoints of these steps."""
    for step in steps:
        (root / str(step)).mkdir(parents=True)
        (root / str(step) / "manifest.json").touch()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_has_the_size_told_before_and_loads_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"checkpoints__checkpoint_interval": 4, "model__model_config__n_embd": 64}
    file, real = config(tmp_path, **more), shutil.disk_usage
    with monkeypatch.context() as patch:
        patch.setattr(saving.shutil, "disk_usage", lambda path: real(path)._replace(free=0))
        with pytest.raises(StorageError) as raised:
            start(load_config(Path(file)))
    told = re.search(r"with Hugging Face folders of ([0-9,]+) bytes", str(raised.value))
    assert told is not None
    assert run_command(["train", file]) == 0
    folder = tmp_path / "run" / "hf" / "4"
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert int(told[1].replace(",", "")) == pytest.approx(weights, rel=0.1)  # and some small files
    model, notes = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert (folder / "pentode_tokenizer.json").is_file()
    assert_equal(ours(tmp_path / "run" / "4"), model.eval())
    assert names(folder.parent) == ["4"]
    assert run_command(["checkpoint", "verify", str(tmp_path / "run")]) == 0


def test_no_step_waits_and_the_end_does(
    tmp_path: Path, pipes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    converting_by(WAITS, monkeypatch)
    seen, real = [], loop.one_step

    def one_step(run: Any, state: Any, steps: Any) -> Any:
        if state.step == 2:
            pipes[0].read_bytes()  # the conversion of checkpoint 2 has begun, and cannot end
        if state.step == 3:
            seen.extend(names(tmp_path / "run" / "hf"))
            pipes[1].write_bytes(b"")
            converting_by(WRITES, monkeypatch)
        return real(run, state, steps)

    monkeypatch.setattr(loop, "one_step", one_step)
    assert run_command(["train", config(tmp_path)]) == 0
    assert seen == [".tmp-2-00000000"]
    assert names(tmp_path / "run" / "hf") == ["2", "4"]


def test_what_fails_is_a_line_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converting_by(FAILS, monkeypatch)
    assert run_command(["train", config(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "could not be written" in line]
    assert [re.search(r"hf/(\d)", line)[1] for line in lines] == ["2", "4"]
    assert all("training goes on (model.safetensors: the disk is full)" in line for line in lines)
    converting_by(WRITES, monkeypatch)
    assert run_command(["train", config(tmp_path)]) == 0  # nothing is left to train, but to write
    assert names(tmp_path / "run" / "hf") == ["2", "4"]


def test_a_folder_that_cannot_be_made_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converting_by(WRITES, monkeypatch)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "hf").write_text("a file of somebody's")
    assert run_command(["train", config(tmp_path)]) == 0
    assert "run/hf: cannot be written, training goes on" in capsys.readouterr().out


def test_a_run_that_fails_leaves_nothing_half(
    tmp_path: Path, pipes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    converting_by(WAITS, monkeypatch)
    checkpoints(tmp_path / "run", 8)
    left: list[HFFolders] = []

    def fail() -> None:
        with HFFolders(tmp_path / "run") as folders:
            left.append(folders)
            folders.wake(tmp_path / "run")
            pipes[0].read_bytes()
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="pulled"):
        fail()
    assert names(tmp_path / "run" / "hf") == []
    left[0].wake(tmp_path / "run")  # by a save that ends late
    assert left[0].idle
    (tmp_path / "run" / "hf" / ".tmp-8-0123abcd").mkdir()  # as one that was killed leaves it
    converting_by(WRITES, monkeypatch)
    with HFFolders(tmp_path / "run"):
        pass
    assert names(tmp_path / "run" / "hf") == ["8"]


def test_a_folder_goes_with_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converting_by(WRITES, monkeypatch)
    checkpoints(tmp_path, 2, 4)
    (tmp_path / "hf" / "1").mkdir(parents=True)  # whose checkpoint was gone before
    with HFFolders(tmp_path) as folders:
        folders.finish()
        assert names(tmp_path / "hf") == ["1", "2", "4"]
        storage.remove(tmp_path / "2")
        folders.wake(tmp_path)
    assert names(tmp_path / "hf") == ["1", "4"]


def test_a_folder_that_was_made_of_another_checkpoint_of_its_step_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converting_by(WRITES, monkeypatch)
    checkpoints(tmp_path, 2)
    (tmp_path / "hf" / "2").mkdir(parents=True)
    (tmp_path / "hf" / "2" / "stale").touch()
    folders = HFFolders(tmp_path)
    assert not folders.is_to_come(2)
    folders.renew(tmp_path / "2")
    folders.finish()
    assert not folders.is_to_come(2)
    assert "stale" not in names(tmp_path / "hf" / "2")


def test_nobody_waits_for_a_folder_that_the_disk_refuses_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(beside.time, "monotonic", lambda: now[0])
    checkpoints(tmp_path, 2)
    (tmp_path / "hf").write_text("a file of somebody's")
    folders = HFFolders(tmp_path)
    assert folders.is_to_come(2)
    now[0] += beside.REFUSED + 1
    assert not folders.is_to_come(2)
    storage.remove(tmp_path / "2")
    (tmp_path / "hf").unlink()
    assert not folders.is_to_come(2)  # of nothing none can be made
    assert capsys.readouterr().out.count("cannot be written") == 1


def test_a_checkpoint_that_is_pruned_meanwhile_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converting_by(FAILS, monkeypatch)
    checkpoints(tmp_path, 2)
    with HFFolders(tmp_path) as folders:
        folders.wake(tmp_path)
        storage.remove(tmp_path / "2")
    assert "could not be written" not in capsys.readouterr().out
    assert names(tmp_path / "hf") == []


def test_a_fresh_run_takes_the_folders_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converting_by(WRITES, monkeypatch)
    assert run_command(["train", config(tmp_path)]) == 0
    (tmp_path / "run" / "hf" / "mine").mkdir()
    assert run_command(["train", str(tiny_yaml(tmp_path, **QUICK)), "--fresh"]) == 0
    assert names(tmp_path / "run" / "hf") == ["mine"]


def test_a_model_that_has_no_form_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"type": "llama", "vocab_size": 61, "rope_interleaved": True}
    assert run_command(["check", config(tmp_path), "model.model_config=" + str(shape)]) == 64
    assert "checkpoints.save_hf: true, but model.model_config.rope_interleaved" in capsys.readouterr().err
