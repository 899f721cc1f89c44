"""A budget for activations: less is kept for backward, and the gradients are the same."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pentode.dist.launch import World
from pentode.errors import ConfigError
from pentode.run import compiled
from pentode.run.build import build
from tests.helpers.tiny import tiny_config

PARTITIONING = "aot_eager_decomp_partition"  # cuts a graph in two as inductor does, and runs it as it is


def block(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    x = F.rms_norm(x, x.shape[1:])
    return x + (F.silu(x @ gate) * (x @ up)).tanh() @ down


def kept_and_gradients(budget: float) -> tuple[int, list[Tensor]]:
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 16), (16, 48), (16, 48), (48, 16)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    run = compiled._keeping(budget, torch.compile(block, fullgraph=True, backend=PARTITIONING))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = run(*tensors)
    for tensor in tensors:  # inputs are there whether or not they are kept
        kept.pop(tensor.data_ptr(), None)
    return sum(kept.values()), list(torch.autograd.grad(y.sum(), tensors))


def test_less_is_kept_and_the_gradients_are_the_same() -> None:
    (most, want), (some, got), (least, others) = (kept_and_gradients(budget) for budget in (1.0, 0.6, 0.05))
    assert least < some < most
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(others, want)


def test_a_budget_without_compiled_blocks_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, model__activation_budget=0.5, model__compile="auto")
    with pytest.raises(ConfigError, match="blocks are not compiled here"):
        build(config, World(), first_step=1)
    for change, text in (
        ({"model__compile": "off"}, "it is for compiled blocks"),
        ({"parallelism__recompute_layer": True, "model__compile": "on"}, "set one of the two"),
    ):
        with pytest.raises(ConfigError, match=f"model.activation_budget: .*{text}"):
            tiny_config(tmp_path, model__activation_budget=0.5, **change)
