"""Our GPT-2 against the one in transformers, at tiny size."""

import pytest
import torch
import transformers

from pentode.config.kinds.gpt2 import GPT2Config
from pentode.dist.mesh import Mesh
from pentode.models import gpt2
from pentode.models.registry import model_for
from pentode.nn.causal_lm import CausalLM, Part
from pentode.parallel.batch import Batch, batch_of
from pentode.parallel.spec import specs_of
from tests.helpers.hf import from_hf, to_hf

TINY = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48, "vocab_size": 61}
SHAPES = {
    "as published": GPT2Config(**TINY),
    "untied, other widths": GPT2Config(**TINY, n_inner=40, layer_norm_epsilon=1e-3, tie_word_embeddings=False),
    "exact gelu": GPT2Config(**TINY, activation_function="gelu"),
    "tanh gelu": GPT2Config(**TINY, activation_function="gelu_pytorch_tanh"),
}


def reference(shape: GPT2Config) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(**shape.to_hf(), attn_implementation="eager", initializer_range=0.2)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))  # so that no bias is 0 and no norm 1
    return model.eval()


def ours(shape: GPT2Config, theirs: dict[str, torch.Tensor]) -> CausalLM:
    model = model_for(shape).build(
        shape,
        Mesh.single(),
        Part.whole(shape.num_layers),
        device=torch.device("cpu"),
        dtype=torch.float32,
        vocab_size_padded=shape.vocab_size,
    )
    model.load_state_dict(from_hf(gpt2.HF_NAMES, theirs, tied=shape.tied))
    return model.eval()


def tokens(rows: int = 2, length: int = 40) -> Batch:
    drawn = torch.randint(TINY["vocab_size"], (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return batch_of(drawn, samples=torch.arange(rows))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_and_loss_equal_transformers(shape: GPT2Config) -> None:
    theirs, batch = reference(shape), tokens()
    model = ours(shape, theirs.state_dict())
    with torch.no_grad():
        want = theirs(batch.tokens.view(2, -1)).logits.flatten(0, 1)
        torch.testing.assert_close(model.logits(None, batch), want, atol=2e-5, rtol=0)
        want_loss = torch.nn.functional.cross_entropy(want, batch.labels, reduction="sum")
        torch.testing.assert_close(model(None, batch), want_loss)
    assert sum(p.numel() for p in model.parameters()) == shape.parameter_count()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_weights_go_there_and_back_bit_for_bit(shape: GPT2Config) -> None:
    theirs = reference(shape).state_dict()
    model = ours(shape, theirs)
    back = to_hf(gpt2.HF_NAMES, dict(model.named_parameters()), specs=specs_of(model))
    assert theirs.keys() - back.keys() == ({"lm_head.weight"} if shape.tied else set())
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in back.items())


def test_a_published_file_with_masks_and_without_prefix_is_read() -> None:
    shape = SHAPES["as published"]
    whole = reference(shape).state_dict()
    trunk = {name.removeprefix("transformer."): w for name, w in whole.items() if name != "lm_head.weight"}
    read = from_hf(gpt2.HF_NAMES, trunk | {"h.0.attn.bias": torch.ones(1, 1, 48, 48)}, tied=True)
    assert all(torch.equal(read[name], w) for name, w in from_hf(gpt2.HF_NAMES, whole, tied=True).items())


def test_gradients_equal_transformers() -> None:
    shape = SHAPES["as published"]
    theirs, batch = reference(shape), tokens()
    model = ours(shape, theirs.state_dict())
    model(None, batch).backward()
    logits = theirs(batch.tokens.view(2, -1)).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum").backward()
    want = from_hf(gpt2.HF_NAMES, {name: p.grad for name, p in theirs.named_parameters()}, tied=True)
    for name, param in model.named_parameters():
        torch.testing.assert_close(
            param.grad, want[name], atol=2e-3, rtol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@torch.no_grad()
def test_a_cache_gives_the_logits_of_the_full_forward() -> None:
    shape = SHAPES["as published"]
    model, batch = ours(shape, reference(shape).state_dict()), tokens()
    want = model.logits(None, batch).unflatten(0, (2, -1))
    cache = model.empty_cache(2, batch.sequence_length)
    for start, stop in ((0, 17), (17, 18), (18, 40)):
        part = Batch(
            *(t.view(2, -1)[:, start:stop].flatten() for t in (batch.tokens, batch.labels, batch.positions)),
            batch.samples,
        )
        got = model.logits(None, part, cache).unflatten(0, (2, -1))
        torch.testing.assert_close(got, want[:, start:stop])
