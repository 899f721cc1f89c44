"""A run begins without torch's compiler, whose import alone takes seconds, where nothing is to be compiled."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pentode import device as devices
from pentode.ops import fused_products
from pentode.ops.cross_entropy import TO_COMPILE
from pentode.run import compiled
from pentode.run.compiled import Kernels, is_wanted, kernels, prepare_blocks
from tests.helpers.tiny import tiny_config, tiny_yaml

LLAMA = {
    "type": "llama",
    "vocab_size": -1,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
PROGRAM = """
import sys
from pathlib import Path
from pentode.config.load import load_config
from pentode.train.start import start
start(load_config(Path(sys.argv[1])))
print(sorted({"sympy", "torch._dynamo", "torch._inductor"} & set(sys.modules)))
"""


def test_a_llama_trains_without_the_compiler(tmp_path: Path) -> None:
    """On a CPU; and where there is a GPU, on that."""
    file = tiny_yaml(tmp_path, general__device="auto", model__model_config=LLAMA)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, False),
        ({"parallelism__recompute_layer": True}, False),
        ({"model__dtype": "float32", "parallelism__pp": 2}, False),
        ({"model__compile": "on"}, True),
        ({"model__compile": "off", "parallelism__tp": 2}, False),
        ({"model__dtype": "float64"}, True),
        ({"model__model_config": LLAMA | {"hidden_act": "gelu"}}, True),
        ({"model__activation_budget": 0.5}, True),
        ({"parallelism__recompute_layer": "selective"}, True),
        ({"parallelism__recompute_layer": "activation"}, False),
        ({"parallelism__tp": 2}, True),
        ({"model__float8": "tensorwise", "model__model_config": LLAMA | {"intermediate_size": 64}}, True),
    ],
    ids=str,
)
def test_a_gpu_compiles_what_has_no_kernel(tmp_path: Path, changes: dict[str, Any], wanted: bool) -> None:
    changes = {"model__dtype": "bfloat16", "model__model_config": LLAMA} | changes
    config = tiny_config(tmp_path, **changes)
    assert is_wanted(config, torch.device("cuda")) is wanted
    assert is_wanted(config, torch.device("cpu")) is (changes.get("model__compile") == "on")


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_off_means_no_kernels_of_ours_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    by_kernels: list[bool] = []

    def run(_: object, x: torch.Tensor) -> None:
        by_kernels.append(devices.runs_kernels(x))

    monkeypatch.setattr(devices, "is_gpu", lambda device: True)
    monkeypatch.setattr(compiled, "run_block", run)
    config, x = tiny_config(tmp_path, model__compile=mode, model__model_config=LLAMA), torch.zeros(1)
    model: Any = SimpleNamespace(forward=run)
    assert not prepare_blocks([model], config, device=x.device)
    model.run_block(None, x)
    model.forward(x, x)
    assert by_kernels == [mode == "auto"] * 2
    assert devices.runs_kernels(x), "only within the model"
    if mode == "off":
        assert kernels(config, x.device) == Kernels()


def test_a_gpu_compiles_a_gpt_2(tmp_path: Path) -> None:
    assert is_wanted(tiny_config(tmp_path), torch.device("cuda"))


@pytest.mark.parametrize(("recompute", "gpu"), [(False, True), (True, True), (True, False)])
def test_blocks_that_are_recomputed_have_torchs_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recompute: bool, gpu: bool
) -> None:
    left_out: list[bool] = []
    monkeypatch.setattr(devices, "is_gpu", lambda device: gpu)
    monkeypatch.setattr(compiled, "run_block", lambda block, x: left_out.append(fused_products._LEFT_OUT.get()))
    config = tiny_config(tmp_path, model__model_config=LLAMA, parallelism__recompute_layer=recompute)
    model: Any = SimpleNamespace()
    prepare_blocks([model], config, device=torch.device("cpu"))
    model.run_block(None, torch.zeros(1))
    assert left_out == [recompute and gpu]
    assert not fused_products._LEFT_OUT.get()


def test_what_a_cpu_compiles_of_the_loss_are_the_passes_that_there_are(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, model__compile="on", model__model_config=LLAMA)
    loss = kernels(config, torch.device("cpu")).loss
    assert [one is None for one in loss] == [one is None for one in TO_COMPILE]
