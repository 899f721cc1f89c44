"""docs/formats.md is enough to read a checkpoint: a reader written from it, without torch, reads what pentode does."""

import ast
import multiprocessing
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks.reliability import tiny_run
from pentode.checkpoint.folder import open_checkpoint
from pentode.checkpoint.layout import DTYPES, Saved
from pentode.checkpoint.load import read_tensors
from pentode.dist.launch import World
from pentode.parallel.spec import specs_of
from pentode.run.build import build
from tests.helpers import plain_reader
from tests.helpers.source import ROOT
from tests.helpers.tiny import tiny_config

multiprocessing.set_forkserver_preload(["tests.helpers.warm"])

STEPS = 3
LLAMA = {
    "type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": -1,
    "max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four ranks, whose boxes are parts of rows and columns."""
    folder = tmp_path_factory.mktemp("prepared")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        config = pool.submit(tiny_run.config_of, folder, tiny_run.FOUR_RANKS, steps=STEPS).result()
    return config.parent / "reference"


@pytest.mark.parametrize("group", ["weights", "optimizer"])
def test_it_reads_the_tensors_that_pentode_reads(run: Path, group: str) -> None:
    found = plain_reader.newest(run).tensors(group)
    here = {name: torch.zeros(tensor.shape, dtype=DTYPES[tensor.dtype]) for name, tensor in found.items()}
    read_tensors(open_checkpoint(run / str(STEPS)), group, {name: Saved.whole(tensor) for name, tensor in here.items()})
    for name, tensor in here.items():
        assert plain_reader.numbers(found[name]) == tensor.flatten().tolist(), name
    assert any(tensor.any() for tensor in here.values())


def test_a_file_holds_a_part_of_a_tensor(run: Path) -> None:
    parts = plain_reader.boxes(run / str(STEPS) / "optimizer-00000-of-00004.safetensors")
    assert any(box.shape != box.global_shape for box in parts)


def test_it_reads_the_counts_and_the_records(run: Path) -> None:
    checkpoint = plain_reader.newest(run)
    assert checkpoint.groups() == ["optimizer", "weights"]
    assert checkpoint.state == open_checkpoint(run / str(STEPS)).state
    assert [row["step"] for row in plain_reader.metrics(run)] == [1, 2, 3]


def test_it_does_not_take_what_is_damaged(run: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(run, tmp_path / "run"))
    file = damaged / str(STEPS) / "weights-00000-of-00004.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(plain_reader.Damaged):
        plain_reader.newest(damaged)


def test_it_knows_neither_torch_nor_pentode(run: Path) -> None:
    path = ROOT / "tests/helpers/plain_reader.py"
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names
    done = subprocess.run([sys.executable, "-I", "-S", str(path), str(run)], capture_output=True, text=True, check=True)
    assert "weights embed.weight BF16 [19, 16] mean" in done.stdout


@pytest.mark.parametrize("changes", [{}, {"model__model_config": LLAMA}], ids=["gpt2", "llama"])
def test_the_page_names_every_tensor_of_a_model(tmp_path: Path, changes: dict[str, object]) -> None:
    page = (ROOT / "docs/formats.md").read_text()
    table = page[page.index("### Names of tensors") : page.index("### How it becomes durable")]
    told = set(re.findall(r"`([\w.]+)`", table))
    built = build(tiny_config(tmp_path, **changes), World(), first_step=1)
    names = {re.sub(r"^layers\.\d+", "layers.0", name) for stage in built.stages.values() for name in specs_of(stage)}
    assert names <= told, f"docs/formats.md does not name {sorted(names - told)}"
