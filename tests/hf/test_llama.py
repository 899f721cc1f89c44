"""Our Llama against the one in transformers, at tiny size."""

import pytest
import torch
import transformers
from torch import Tensor

from pentode.config.kinds.llama import LlamaConfig, RopeScaling
from pentode.dist.mesh import Mesh
from pentode.errors import CheckpointError
from pentode.models import llama
from pentode.nn.causal_lm import CausalLM, Part
from pentode.parallel.batch import Batch, batch_of
from pentode.parallel.spec import specs_of
from tests.helpers.hf import from_hf, to_hf

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
LLAMA3 = RopeScaling(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
SHAPES = {
    "llama 1": LlamaConfig(**TINY),
    "llama 2, grouped heads": LlamaConfig(**TINY, num_key_value_heads=2, rms_norm_eps=1e-5),
    "llama 3.1": LlamaConfig(**TINY, num_key_value_heads=1, rope_theta=500000.0, rope_scaling=LLAMA3),
    "llama 3.2, tied": LlamaConfig(**TINY, num_key_value_heads=2, rope_scaling=LLAMA3, tie_word_embeddings=True),
    "linear scaling": LlamaConfig(**TINY, rope_scaling=RopeScaling(rope_type="linear", factor=4.0)),
}


def reference(shape: LlamaConfig) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape.to_hf(), attn_implementation="eager", initializer_range=0.2)
    return transformers.LlamaForCausalLM(config).eval()


def ours(shape: LlamaConfig, weights: dict[str, Tensor], *, padded: int | None = None) -> CausalLM:
    model = llama.build(
        shape,
        Mesh.single(),
        Part.whole(shape.num_layers),
        device=torch.device("cpu"),
        dtype=torch.float32,
        vocab_size_padded=padded or shape.vocab_size,
    )
    specs = specs_of(model)
    assert weights.keys() == specs.keys()
    model.load_state_dict({name: specs[name].take(weight) for name, weight in weights.items()})
    return model.eval()


def tokens(rows: int = 2, length: int = 40) -> Batch:
    drawn = torch.randint(TINY["vocab_size"], (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return batch_of(drawn, samples=torch.arange(rows))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_and_loss_equal_transformers(shape: LlamaConfig) -> None:
    theirs, batch = reference(shape), tokens()
    model = ours(shape, from_hf(llama.HF_NAMES, theirs.state_dict(), tied=shape.tied))
    with torch.no_grad():
        want = theirs(batch.tokens.view(2, -1)).logits.flatten(0, 1)
        torch.testing.assert_close(model.logits(None, batch), want, atol=2e-5, rtol=0)
        want_loss = torch.nn.functional.cross_entropy(want, batch.labels, reduction="sum")
        torch.testing.assert_close(model(None, batch), want_loss)
    assert sum(p.numel() for p in model.parameters()) == shape.parameter_count()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_weights_go_there_and_back_bit_for_bit(shape: LlamaConfig) -> None:
    theirs = reference(shape).state_dict()
    model = ours(shape, from_hf(llama.HF_NAMES, theirs, tied=shape.tied))
    back = to_hf(llama.HF_NAMES, dict(model.named_parameters()), specs=specs_of(model))
    assert theirs.keys() - back.keys() == ({"lm_head.weight"} if shape.tied else set())
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in back.items())


@pytest.mark.parametrize("shape", [SHAPES["llama 1"], SHAPES["llama 3.2, tied"]], ids=["untied", "tied"])
def test_padding_the_vocabulary_changes_neither_loss_nor_logits_nor_gradients(shape: LlamaConfig) -> None:
    weights, batch = from_hf(llama.HF_NAMES, reference(shape).state_dict(), tied=shape.tied), tokens()
    plain, padded = ours(shape, weights), ours(shape, weights, padded=128)
    for model in (plain, padded):
        model(None, batch).backward()
    torch.testing.assert_close(padded(None, batch), plain(None, batch))
    torch.testing.assert_close(padded.logits(None, batch), plain.logits(None, batch))
    for name, param in padded.named_parameters():
        want = plain.get_parameter(name)
        torch.testing.assert_close(
            param.grad, param.spec.take(want.grad), msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_trunk_alone_is_read_too() -> None:
    shape = SHAPES["llama 3.2, tied"]
    whole = reference(shape).state_dict()
    trunk = {name.removeprefix("model."): w for name, w in whole.items() if name != "lm_head.weight"}
    read = from_hf(llama.HF_NAMES, trunk, tied=True)
    assert all(torch.equal(read[name], w) for name, w in from_hf(llama.HF_NAMES, whole, tied=True).items())


def test_a_tensor_without_a_place_is_an_error() -> None:
    weights = reference(SHAPES["llama 1"]).state_dict()
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj\.bias has no place"):
        from_hf(llama.HF_NAMES, weights | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, tied=False)
    with pytest.raises(CheckpointError, match="differs from"):
        from_hf(llama.HF_NAMES, weights, tied=True)
    del weights["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight is not there"):
        from_hf(llama.HF_NAMES, weights, tied=False)


def test_interleaved_rotation_is_the_halves_one_with_features_in_another_order() -> None:
    shape = SHAPES["llama 2, grouped heads"]
    weights = from_hf(llama.HF_NAMES, reference(shape).state_dict(), tied=False)
    order = torch.arange(shape.head_dim).view(2, -1).T.flatten()  # halves (i, i + E/2) laid side by side
    interleaved = dict(weights)
    for name, qkv in weights.items():
        if name.endswith("qkv.weight"):
            heads = qkv.unflatten(0, (-1, shape.head_dim)).clone()
            heads[: -shape.kv_heads] = heads[: -shape.kv_heads, order]  # v is not rotated
            interleaved[name] = heads.flatten(0, 1)
    other = LlamaConfig(**TINY, num_key_value_heads=2, rms_norm_eps=1e-5, rope_interleaved=True)
    want = ours(shape, weights).logits(None, tokens())
    torch.testing.assert_close(ours(other, interleaved).logits(None, tokens()), want)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_a_cache_gives_the_logits_of_the_full_forward(shape: LlamaConfig) -> None:
    model, batch = ours(shape, from_hf(llama.HF_NAMES, reference(shape).state_dict(), tied=shape.tied)), tokens()
    want = model.logits(None, batch).unflatten(0, (2, -1))
    cache = model.empty_cache(2, batch.sequence_length)
    for start, stop in ((0, 17), (17, 18), (18, 30), (30, 40)):
        assert cache.length == start
        part = Batch(
            *(t.view(2, -1)[:, start:stop].flatten() for t in (batch.tokens, batch.labels, batch.positions)),
            batch.samples,
        )
        got = model.logits(None, part, cache, last_only=True)
        torch.testing.assert_close(got, want[:, stop - 1])
    with pytest.raises(ValueError, match="cache: 50 places, but room for 40"):
        model.logits(None, tokens(2, 10), cache)
