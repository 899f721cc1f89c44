"""Our generation against the one in transformers: the same greedy texts, the same distributions to draw from."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pentode.config.kinds.gpt2 import GPT2Config
from pentode.config.kinds.llama import LlamaConfig, RopeScaling
from pentode.dist.mesh import Mesh
from pentode.generate.engine import generate
from pentode.generate.sampling import Sampling, filtered
from pentode.models.registry import model_for
from pentode.nn.causal_lm import CausalLM, Part
from tests.helpers.hf import from_hf

VOCABULARY = 61
POSITIONS = 64
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
}
LLAMA3 = RopeScaling(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
SHAPES = {
    "llama, untied": LlamaConfig(**TINY),
    "llama, tied": LlamaConfig(**TINY, tie_word_embeddings=True),
    "llama 3.2": LlamaConfig(**TINY, rope_scaling=LLAMA3, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, vocab_size=VOCABULARY),
}
GREEDY = Sampling(max_new_tokens=50, temperature=0)


def reference(shape: LlamaConfig | GPT2Config) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    kind = transformers.AutoConfig.for_model(**shape.to_hf(), initializer_range=0.3)
    model = transformers.AutoModelForCausalLM.from_config(kind, dtype=torch.float32).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return model


def ours(shape: LlamaConfig | GPT2Config, theirs: transformers.PreTrainedModel) -> CausalLM:
    kind = model_for(shape)
    model = kind.build(
        shape,
        Mesh.single(),
        Part.whole(shape.num_layers),
        device=torch.device("cpu"),
        dtype=torch.float32,
        vocab_size_padded=VOCABULARY,
    )
    model.load_state_dict(from_hf(kind.HF_NAMES, theirs.state_dict(), tied=shape.tied))
    return model


def greedy(model: transformers.PreTrainedModel, tokens: Tensor, *, eos: int | None = None) -> Tensor:
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=GREEDY.max_new_tokens,
        eos_token_id=eos,
        pad_token_id=eos,
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_greedy_texts_equal_transformers(shape: LlamaConfig | GPT2Config) -> None:
    theirs = reference(shape)
    theirs.generation_config.eos_token_id = None  # so that no text ends before its time
    tokens = torch.randint(VOCABULARY, (4, 9))
    want = greedy(theirs, tokens)
    assert want.shape == (4, 59)
    assert len(want[:, 9:].unique()) > 8, "texts that repeat one token prove little"
    model = ours(shape, theirs)
    assert torch.equal(generate(model, tokens, sampling=GREEDY, max_positions=POSITIONS), want)

    ends = torch.bincount(want[:, 9:].flatten())  # a token that some rows come to sooner than others
    eos = max((t for t in range(VOCABULARY) if ends[t]), key=lambda t: len({_first(row, t) for row in want[:, 9:]}))
    ended = greedy(theirs, tokens, eos=eos)
    assert not torch.equal(ended, want[:, : ended.shape[1]])
    assert torch.equal(generate(model, tokens, sampling=GREEDY, max_positions=POSITIONS, eos_id=eos), ended)


@given(
    temperature=st.floats(0.1, 5.0),
    top_k=st.none() | st.integers(1, 2 * VOCABULARY),
    top_p=st.none() | st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_distributions_to_draw_from_equal_transformers(
    temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> None:
    logits = 3 * torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    want = warpers(torch.zeros(2, 1, dtype=torch.int64), logits).softmax(-1)
    got = filtered(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p)).softmax(-1)
    torch.testing.assert_close(got, want)


def _first(row: Tensor, token: int) -> int:
    """Where a token first stands in a row, or the row's length."""
    places = (row == token).nonzero()
    return int(places[0]) if len(places) else len(row)
