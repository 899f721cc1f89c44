"""The model by parts: two pipeline stages, run one after the other, give what the whole model gives."""

import pytest
import torch

from pentode.config.kinds.gpt2 import GPT2Config
from pentode.config.kinds.llama import LlamaConfig
from pentode.config.kinds.shape import Shape
from pentode.dist.mesh import Mesh
from pentode.models.registry import model_for
from pentode.nn.causal_lm import CausalLM, Part
from pentode.nn.init import initialise
from pentode.parallel.batch import Batch, batch_of
from pentode.parallel.spec import specs_of

SHAPES = {
    "llama": LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4, vocab_size=19
    ),
    "gpt2, tied": GPT2Config(n_embd=16, n_layer=4, n_head=2, n_positions=16, vocab_size=19),
}


def build(shape: Shape, part: Part, *, seed: int = 3, dtype: torch.dtype = torch.float64) -> CausalLM:
    model = model_for(shape).build(
        shape, Mesh.single(), part, device=torch.device("cpu"), dtype=dtype, vocab_size_padded=32, seed=seed
    )
    if dtype != torch.bfloat16:
        initialise(dict(model.named_parameters()), specs_of(model), std=0.2, residual_std=0.1, seed=0)
    return model


def batch(*samples: int) -> Batch:
    rows = torch.stack([torch.randint(19, (9,), generator=torch.Generator().manual_seed(i)) for i in samples])
    return batch_of(rows, samples=torch.tensor(samples))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_two_stages_give_the_whole_model_s_loss_and_gradients_under_the_same_names(shape: Shape) -> None:
    whole = build(shape, Part.whole(4))
    want = whole(None, batch(5, 6))
    want.backward()
    first = build(shape, Part(range(2), first=True, last=False))
    last = build(shape, Part(range(2, 4), first=False, last=True))
    loss = last(first(None, batch(5, 6)), batch(5, 6))
    loss.backward()
    assert torch.equal(loss, want)
    names = {name for stage in (first, last) for name, _ in stage.named_parameters()}
    assert names == {name for name, _ in whole.named_parameters()}
    for name in names:
        grad = sum(dict(stage.named_parameters())[name].grad for stage in (first, last) if name in specs_of(stage))
        torch.testing.assert_close(grad, whole.get_parameter(name).grad, msg=lambda e, n=name: f"{n}: {e}")


def test_dropout_follows_sample_and_seed_not_micro_batch_or_time() -> None:
    shape = SHAPES["gpt2, tied"]
    model = build(shape, Part.whole(4))
    both = model(None, batch(5, 6))
    assert torch.equal(both, model(None, batch(5, 6)))
    torch.testing.assert_close(both, model(None, batch(5)) + model(None, batch(6)))
    assert not torch.equal(both, build(shape, Part.whole(4), seed=4)(None, batch(5, 6)))
    still = model.eval()(None, batch(5, 6))
    assert not torch.equal(both, still)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_layer_and_parameter_names_are_the_contract_s(shape: Shape) -> None:
    names = set(specs_of(build(shape, Part(range(3, 4), first=True, last=True))))
    common = {
        "embed.weight",
        "layers.3.attn_norm.weight",
        "layers.3.attn.qkv.weight",
        "layers.3.attn.out.weight",
        "layers.3.mlp_norm.weight",
        "layers.3.mlp.down.weight",
        "norm.weight",
    }
    own = {
        "llama": {"layers.3.mlp.gate_up.weight", "head.weight"},
        "gpt2": {"layers.3.mlp.up.weight", "positions.weight"},
    }
    biases = {name for name in names if name.endswith(".bias")}
    assert names - biases == common | own[shape.type]
    assert len(biases) == (7 if shape.type == "gpt2" else 0)
    assert names == set(build(shape, Part(range(3, 4), first=True, last=True)).state_dict())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_bfloat16_weights_give_bfloat16_activations_and_a_float32_loss(shape: Shape) -> None:
    wide, narrow = build(shape, Part.whole(4), dtype=torch.float32), build(shape, Part.whole(4), dtype=torch.bfloat16)
    narrow.load_state_dict(wide.state_dict())
    wide.load_state_dict(narrow.state_dict())
    wide.eval(), narrow.eval()
    loss = narrow(None, batch(5, 6))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.bfloat16 for p in narrow.parameters())
    # Four layers of 8-bit activations: a loss of about 50 moves in its third digit.
    torch.testing.assert_close(loss, wide(None, batch(5, 6)), atol=0, rtol=0.01)


def test_every_gradient_arrives_once_per_backward() -> None:
    model = build(SHAPES["gpt2, tied"], Part.whole(4))
    calls: dict[str, int] = dict.fromkeys(specs_of(model), 0)
    for name, param in model.named_parameters():

        def count(_: torch.Tensor, name: str = name) -> None:
            calls[name] += 1

        param.register_post_accumulate_grad_hook(count)
    model(None, batch(5, 6)).backward()
    assert set(calls.values()) == {1}, calls
