"""A run that starts again finds its compiled blocks in torch's cache, on every rank; another layout does not."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from pentode.config.schema import Config
from pentode.dist.mesh import Axis, Mesh
from pentode.parallel.tensor import ColumnLinear, Place, RowLinear
from pentode.run.compiled import prepare_blocks
from tests.helpers.cases import Case, Problem, batches_of, config_of, run_of
from tests.helpers.world import WORLD

CPU = torch.device("cpu")
LAYERS = 1
LLAMA = Problem(shape=(("num_hidden_layers", LAYERS),))
DROPPING = Problem(
    model="gpt2", shape=(("n_layer", LAYERS), ("attn_pdrop", 0.3), ("resid_pdrop", 0.2), ("embd_pdrop", 0.1))
)
FORMS = (
    Case(LLAMA, tp=2),
    Case(LLAMA, tp=2, sequence_parallel=True, recompute="selective"),
    Case(DROPPING, tp=2, sequence_parallel=True, gather_again=False, recompute=True),
    Case(DROPPING, tp=2, overlap=True, recompute="selective"),
    Case(LLAMA, tp=2, sequence_parallel=True, overlap=True),
)
FORWARD_AND_BACKWARD = {"autograd_cache_hit": 1, "fxgraph_cache_hit": 2}


class Reached(Exception):
    """The compiler has looked into its cache, found nothing, and would now make kernels."""


class CutLayers(nn.Module):
    """What of a block communicates, and little else, since a CPU's kernels take seconds to compile."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.column, self.row = ColumnLinear(8, (8,), place=place), RowLinear(8, 8, place=place)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(place.tp.rank))

    def forward(self, x: Tensor, shared: None) -> Tensor:
        return self.row(self.column(x))


def cache_counts() -> dict[str, int]:
    """What torch has counted of its caches since it was last asked."""
    found: Counter[str] = counters["aot_autograd"] + counters["inductor"]
    counters.clear()
    return {name: count for name, count in found.items() if "cache" in name and not name.endswith("saved")}


def compiling(case: Case) -> Config:
    config = config_of(case)
    return replace(config, model=replace(config.model, compile="on"))


def look_blocks_up(*, forms: tuple[Case, ...]) -> list[dict[str, int]]:
    """What compiling a block of each form counts, up to where kernels would be made."""
    found = []
    for case in forms:
        run = run_of(case)
        prepare_blocks(run.stages.values(), compiling(case), device=CPU)
        cache_counts()
        with (
            patch("torch._inductor.compile_fx.fx_codegen_and_compile", side_effect=Reached),
            pytest.raises(Exception, match="Reached"),
        ):
            run.stages[0](None, batches_of(case, run.mesh, 0)[0])
        found.append(cache_counts())
    return found


@pytest.mark.parametrize("forms", [FORMS[:2], pytest.param(FORMS[2:], marks=pytest.mark.long)], ids=["two", "others"])
def test_no_form_of_block_passes_the_cache_by(tmp_path: Path, forms: tuple[Case, ...]) -> None:
    with patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)):
        found = WORLD.run(look_blocks_up, 2, forms=forms)
    for case, *ranks in zip(forms, *found, strict=True):
        assert ranks == [{"autograd_cache_miss": 1, "fxgraph_cache_miss": 1}] * 2, case.name


def start(*, folder: str, axis: str, overlap: bool) -> tuple[dict[str, int], list[Tensor]]:
    """Compile cut layers and go through them once; what this counted, and the output and gradients."""
    tp: Axis = getattr(Mesh.build(tp=2), axis)
    layers = CutLayers(Place(tp, CPU, torch.float64, sequence_parallel=True, gather_again=True, overlap=overlap))
    model: Any = SimpleNamespace()
    prepare_blocks([model], compiling(Case()), device=CPU)
    cache_counts()
    x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2 + tp.rank)).requires_grad_()
    inputs = [x, *layers.parameters()]
    with patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
        y = model.run_block(layers, x, None)
        results = [y, *torch.autograd.grad(y.square().sum(), inputs)]
    plain = layers(x, None)
    torch.testing.assert_close(results, [plain, *torch.autograd.grad(plain.square().sum(), inputs)])
    return cache_counts(), [result.detach() for result in results]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_second_start_compiles_nothing_and_another_group_shares_nothing(tmp_path: Path, overlap: bool) -> None:
    first, second, other = (
        WORLD.run(start, 2, folder=str(tmp_path), axis=axis, overlap=overlap) for axis in ("tp", "tp", "world")
    )
    for (_, before), (counts, after) in zip(first, second, strict=True):
        assert counts == FORWARD_AND_BACKWARD
        assert all(map(torch.equal, before, after))
    if overlap:  # its operators are told the rank
        assert all("autograd_cache_hit" not in counts for counts, _ in first)
    assert any("autograd_cache_miss" in counts for counts, _ in other)
