"""The example on eight processes, as users start it, writes one process's numbers to eleven digits at every step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.source import ROOT
from tests.helpers.tiny import rows

EXAMPLE = "examples/llama/config_tiny_llama.yaml"
ALONE = [f"parallelism.{axis}=1" for axis in ("dp", "tp", "pp")]


def train(run: Path, *words: str) -> None:
    """`pentode train` of the example in float64, in processes of its own, on the CPU."""
    changes = ["model.dtype=float64", "general.device=cpu", f"checkpoints.checkpoints_path={run}"]
    command = [sys.executable, "-m", "pentode", "train", EXAMPLE, *changes, *words]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_eight_processes_write_one_processs_numbers(tmp_path: Path) -> None:
    train(tmp_path / "eight", "--nproc", "8")
    train(tmp_path / "one", *ALONE, "tokens.batch_accumulation_per_replica=4")
    eight, one = rows(tmp_path / "eight"), rows(tmp_path / "one")
    assert [row["step"] for row in eight] == [row["step"] for row in one] == list(range(1, 16))
    largest = 0.0
    for several, single in zip(eight, one, strict=True):
        assert several["consumed_tokens"] == single["consumed_tokens"]
        for key in ("lm_loss", "grad_norm"):
            assert several[key] == pytest.approx(single[key], rel=1e-11, abs=0), f"{key} of step {single['step']}"
            largest = max(largest, abs(several[key] / single[key] - 1))
    print(f"largest relative difference: {largest:.1e}")
