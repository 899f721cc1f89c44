"""Two data-parallel processes, started as users start them, train what one process trains."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pentode.cli import run_command
from tests.helpers.source import ROOT
from tests.helpers.tiny import rows, tiny_yaml, weights


def train(*words: str) -> int:
    """`pentode train` in processes of its own."""
    return subprocess.run([sys.executable, "-m", "pentode", "train", *words], cwd=ROOT, check=False).returncode


def test_two_processes_write_one_processs_numbers(tmp_path: Path) -> None:
    file = str(tiny_yaml(tmp_path, model__dtype="float64"))
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_command(["train", file, f"checkpoints.checkpoints_path={one}"]) == 0
    halves = ["parallelism.dp=2", "tokens.batch_accumulation_per_replica=1", f"checkpoints.checkpoints_path={two}"]
    assert train(file, *halves, "--nproc", "2") == 0
    for single, double in zip(rows(one), rows(two), strict=True):
        assert single["step"] == double["step"]
        assert single["consumed_tokens"] == double["consumed_tokens"]
        for key in ("lm_loss", "grad_norm", "val_loss"):
            assert (single[key] is None) == (double[key] is None)
            assert double[key] is None or double[key] == pytest.approx(single[key], rel=1e-11, abs=0)


@pytest.mark.long  # test_resharding does the same with ranks that are there already
def test_one_process_goes_on_with_what_two_began(tmp_path: Path) -> None:
    file = str(tiny_yaml(tmp_path, model__dtype="float64", tokens__val_check_interval=-1))
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert run_command(["train", file, f"checkpoints.checkpoints_path={whole}"]) == 0
    path = f"checkpoints.checkpoints_path={shared}"
    constant = "optimizer.learning_rate_scheduler.lr_decay_steps=10"
    halves = ["parallelism.dp=2", "tokens.batch_accumulation_per_replica=1", "tokens.train_steps=8", constant]
    assert train(file, *halves, path, "--nproc", "2") == 0
    assert run_command(["train", file, path]) == 0
    assert [row["step"] for row in rows(shared)] == list(range(1, 13))
    for single, both in zip(rows(whole), rows(shared), strict=True):
        assert both["lm_loss"] == pytest.approx(single["lm_loss"], rel=1e-10, abs=0)
    assert len(weights(shared, 12)) == len(weights(whole, 12))


def test_a_signal_to_the_launcher_saves_and_exits_75(tmp_path: Path) -> None:
    file, run = (
        str(
            tiny_yaml(
                tmp_path,
                tokens__train_steps=100000,
                tokens__val_check_interval=-1,
                checkpoints__checkpoint_interval=10**6,
            )
        ),
        tmp_path / "run",
    )
    words = ["train", file, "parallelism.dp=2", "tokens.batch_accumulation_per_replica=1", "--nproc", "2"]
    with subprocess.Popen([sys.executable, "-m", "pentode", *words], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if b"iteration: 10 " in line:
                os.kill(process.pid, signal.SIGTERM)
                break
        process.stdout.read()
        assert process.wait() == 75
    last = rows(run)[-1]["step"]
    assert (run / str(last) / "manifest.json").exists()


def test_a_wrong_number_of_processes_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pentode.dist.launch.start_local", lambda *_: pytest.fail("processes were started"))
    file = str(tiny_yaml(tmp_path))
    assert run_command(["train", file, "parallelism.dp=3", "--nproc", "2"]) == 64
    assert run_command(["train", file, "parallelism.dp=2"]) == 64
    assert not (tmp_path / "run").exists()
