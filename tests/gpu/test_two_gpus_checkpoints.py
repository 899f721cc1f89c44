"""What two GPUs saved under tensor parallelism goes on under data or pipeline parallelism, in bfloat16."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.source import ROOT
from tests.helpers.tiny import rows, tiny_yaml

LAST, SAVED = 12, 6
SHAPE = {
    "type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": -1,
    "max_position_embeddings": 16,
}
TP = ("parallelism.tp=2", "parallelism.tp_mode=REDUCE_SCATTER")
ZERO = ("parallelism.dp=2", "optimizer.zero_stage=1", "tokens.batch_accumulation_per_replica=1")
PIPELINE = ("parallelism.pp=2", "parallelism.pp_engine=1f1b")
DEVICE = "cuda"
TOLERANCE = 2e-2  # of a loss: each product is rounded to 8 bits, and rounding differs where sums are cut elsewhere


def train(file: Path, run: Path, *layout: str) -> list[float]:
    """The losses of all steps in the metrics of `run`, trained by `pentode train` in two processes."""
    places = (f"checkpoints.checkpoints_path={run}", f"general.device={DEVICE}")
    words = [sys.executable, "-m", "pentode", "train", str(file), *places, *layout, "--nproc", "2"]
    subprocess.run(words, cwd=ROOT, check=True)
    return [row["lm_loss"] for row in rows(run)]


@pytest.fixture(scope="module")
def stays(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[float]]:
    """A config file, the folder of a run of it that stays under tp=2, and its losses."""
    folder = tmp_path_factory.mktemp("stays")
    file = tiny_yaml(
        folder,
        model__dtype="bfloat16",
        model__model_config=SHAPE,
        checkpoints__checkpoint_interval=SAVED,
        tokens__train_steps=LAST,
        optimizer__learning_rate_scheduler__learning_rate=1e-3,
        tokens__val_check_interval=-1,
    )
    return file, folder / "run", train(file, folder / "run", *TP)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layout", [ZERO, PIPELINE], ids=["dp2 ZeRO-1", "pp2 1f1b"])
def test_a_run_goes_on_in_another_layout(
    tmp_path: Path, layout: tuple[str, ...], stays: tuple[Path, Path, list[float]]
) -> None:
    file, run, losses = stays
    shutil.copytree(run / str(SAVED), tmp_path / "moves" / str(SAVED))
    moved = train(file, tmp_path / "moves", *layout)
    print(f"LOSSES tp2: {losses[:SAVED]}; then tp2: {losses[SAVED:]}; then {' '.join(layout)}: {moved}")
    assert losses[-1] < losses[0] - 0.3
    assert moved == pytest.approx(losses[SAVED:], rel=TOLERANCE)
