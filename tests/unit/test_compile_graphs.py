"""All equal blocks share one compiled graph, and no step after the first compiles anything."""

import pytest
import torch
from torch._dynamo.utils import counters

from pentode.config.kinds.gpt2 import GPT2Config
from pentode.config.kinds.llama import LlamaConfig
from pentode.config.kinds.shape import Shape
from pentode.dist.mesh import Mesh
from pentode.models.registry import model_for
from pentode.nn.causal_lm import CausalLM, Part, run_block
from pentode.nn.init import initialise
from pentode.parallel.batch import Batch, batch_of
from pentode.parallel.spec import specs_of

GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16, "vocab_size": 19}
SHAPES = {
    "llama": LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=19,
    ),
    "gpt2, dropout on": GPT2Config(**GPT2),
    "gpt2, dropout off": GPT2Config(**GPT2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
}


def build(shape: Shape) -> CausalLM:
    model = model_for(shape).build(
        shape,
        Mesh.single(),
        Part.whole(shape.num_layers),
        device=torch.device("cpu"),
        dtype=torch.float64,
        vocab_size_padded=32,
        seed=3,
    )
    initialise(dict(model.named_parameters()), specs_of(model), std=0.2, residual_std=0.1, seed=0)
    return model


def batch(step: int) -> Batch:
    rows = torch.randint(19, (2, 9), generator=torch.Generator().manual_seed(step))
    return batch_of(rows, samples=torch.arange(2 * step, 2 * step + 2))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equal_blocks_share_one_graph_and_later_steps_add_none(shape: Shape) -> None:
    torch.compiler.reset()
    counters.clear()
    eager, compiled = build(shape), build(shape)
    compiled.run_block = torch.compile(run_block, fullgraph=True, backend="aot_eager")
    for step in range(3):
        for model in (eager, compiled):
            model.zero_grad()
            loss = model(None, batch(step))
            loss.backward()
        assert counters["stats"]["unique_graphs"] == 1, f"step {step}: {dict(counters['stats'])}"
        torch.testing.assert_close(compiled(None, batch(step)), eager(None, batch(step)))
        for name, param in compiled.named_parameters():
            torch.testing.assert_close(param.grad, eager.get_parameter(name).grad, msg=lambda e, n=name: f"{n}: {e}")
    assert not counters["graph_break"]


def test_generation_compiles_nothing() -> None:
    torch.compiler.reset()
    counters.clear()
    model = build(SHAPES["llama"]).eval()
    model.run_block = torch.compile(run_block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        model.logits(None, batch(0), model.empty_cache(2, 8))
    assert counters["stats"]["unique_graphs"] == 0
