"""Model shapes: exact parameter counts, arithmetic, and Hugging Face's config.json there and back."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pentode.config.editor import field_paths, json_schema
from pentode.config.kinds.gpt2 import GPT2Config
from pentode.config.kinds.llama import LlamaConfig, RopeScaling
from pentode.config.kinds.shape import Shape
from pentode.config.yaml_reader import read
from pentode.errors import ConfigError

TUTORIAL = Path(__file__).parents[1] / "data" / "tutorial_tiny_llama.yaml"
TINY = LlamaConfig(
    hidden_size=16,
    intermediate_size=64,
    num_attention_heads=4,
    num_hidden_layers=2,
    num_key_value_heads=4,
    tie_word_embeddings=True,
    vocab_size=256,
)
LLAMA_3_2_1B = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_attention_heads=32,
    num_hidden_layers=16,
    num_key_value_heads=8,
    tie_word_embeddings=True,
    vocab_size=128256,
    rope_theta=5e5,
    rope_scaling=RopeScaling(rope_type="llama3", factor=32.0),
)


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        (TINY, 12_368),  # 256*16 + 2*(4*16*16 + 3*16*64 + 2*16) + 16
        (LLAMA_3_2_1B, 1_235_814_400),  # as published
        (LlamaConfig(), 6_738_415_616),  # Llama 2 7B, as published
        (GPT2Config(), 124_439_808),  # GPT-2 small, as published
        (GPT2Config(n_embd=1600, n_layer=48, n_head=25), 1_557_611_200),  # GPT-2 XL, as published
        (GPT2Config(tie_word_embeddings=False), 124_439_808 + 50257 * 768),
        (GPT2Config(n_embd=4, n_layer=1, n_head=1, n_inner=8, n_positions=2, vocab_size=3), 3 * 4 + 2 * 4 + 172 + 8),
    ],
)
def test_parameters_are_counted_exactly(shape: Shape, parameters: int) -> None:
    assert shape.parameter_count() == parameters


def test_parameters_can_be_counted_for_another_vocabulary() -> None:
    open_shape = TINY.with_vocab_size(-1)
    assert open_shape.parameter_count(256) == TINY.parameter_count()
    assert open_shape.with_vocab_size(256) == TINY
    with pytest.raises(ValueError, match="taken from the data"):
        open_shape.parameter_count()


def test_operations_are_nanotrons_count() -> None:
    h, layers, s, ffn, v, heads, kv, d = 2048, 16, 8192, 8192, 128256, 32, 8, 64
    block = 2 * s * h * (heads + 2 * kv) * d + 4 * heads * s**2 * d + 2 * s * heads * d * h + 6 * s * h * ffn
    assert LLAMA_3_2_1B.flops_per_sequence(s) == pytest.approx(3 * (layers * block + 2 * s * h * v), rel=1e-12)
    assert LLAMA_3_2_1B.recomputed_flops_per_sequence(s) == pytest.approx(layers * block, rel=1e-12)
    halved = LLAMA_3_2_1B.flops_per_sequence(s) - LLAMA_3_2_1B.causal_flops_per_sequence(s)
    assert halved == pytest.approx(3 * layers * 2 * heads * s**2 * d, rel=1e-12)


def test_gpt2s_mlp_has_two_matrices() -> None:
    shape = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=3)
    weights = 4 * 8 * 8 + 2 * 8 * 32 + 3 * 8
    assert shape.flops_per_sequence(5) == 6 * 5 * weights + 12 * 25 * 8


@pytest.mark.parametrize("shape", [TINY, LLAMA_3_2_1B])
def test_all_shapes_answer_to_the_same_names(shape: LlamaConfig) -> None:
    assert (shape.width, shape.num_layers, shape.heads) == (
        shape.hidden_size,
        shape.num_hidden_layers,
        shape.num_attention_heads,
    )
    assert shape.head_dim * shape.heads == shape.width
    gpt2 = GPT2Config(n_embd=12, n_head=3)
    assert (gpt2.width, gpt2.heads, gpt2.kv_heads, gpt2.head_dim, gpt2.ffn_width) == (12, 3, 3, 4, 48)
    assert (gpt2.max_positions, gpt2.tied) == (1024, True)
    assert LlamaConfig(num_attention_heads=8).kv_heads == 8


small = st.integers(1, 8)


@given(small, small, small, st.booleans(), st.sampled_from([None, "linear", "llama3"]), st.floats(1, 64))
def test_llamas_config_json_comes_back_as_the_same_shape(
    layers: int, kv: int, each: int, tied: bool, rope: Any, factor: float
) -> None:
    shape = LlamaConfig(
        hidden_size=kv * each * 4,
        num_attention_heads=kv * each,
        num_key_value_heads=kv,
        num_hidden_layers=layers,
        tie_word_embeddings=tied,
        rope_scaling=None if rope is None else RopeScaling(rope_type=rope, factor=factor),
    )
    assert LlamaConfig.from_hf(shape.to_hf()) == shape


@given(small, small, small, st.floats(0, 0.9), st.sampled_from([None, 7]))
def test_gpt2s_config_json_comes_back_as_the_same_shape(
    layers: int, heads: int, each: int, dropout: float, inner: int | None
) -> None:
    shape = GPT2Config(n_embd=heads * each, n_head=heads, n_layer=layers, n_inner=inner, attn_pdrop=dropout)
    assert GPT2Config.from_hf(shape.to_hf()) == shape


def test_both_generations_of_rope_keys_are_read() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    base = {"hidden_size": 64, "num_attention_heads": 4}
    older = LlamaConfig.from_hf(base | {"rope_theta": 5e5, "rope_scaling": scaling})
    newer = LlamaConfig.from_hf(base | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    assert older == newer
    assert (newer.rope_theta, newer.rope_scaling) == (5e5, RopeScaling(rope_type="llama3", factor=8.0))
    assert (
        LlamaConfig.from_hf(base | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}).rope_scaling
        is None
    )


@pytest.mark.parametrize(
    ("config_json", "problem"),
    [
        ({"attention_bias": True}, "config.json: attention_bias: True is not built yet; False or None is"),
        ({"model_type": "mistral"}, "config.json: model_type: 'mistral' is not built yet; 'llama' is"),
        ({"head_dim": 96}, "config.json: head_dim: 96 is not built yet; 128 or None is"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "config.json: rope_scaling.rope_type: 'yarn'; must be default or linear or llama3",
        ),
        ({"hidden_act": "tanh"}, "config.json: hidden_act: 'tanh'; must be silu or relu or gelu or gelu_new or "),
    ],
)
def test_a_foreign_model_that_we_cannot_be_is_refused_by_name(config_json: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        LlamaConfig.from_hf(config_json)
    assert error.value.problems[0].startswith(problem)


def test_interleaved_rotation_has_no_form_in_hugging_faces_llama() -> None:
    with pytest.raises(ConfigError, match="rope_interleaved"):
        dataclasses.replace(TINY, rope_interleaved=True).to_hf()


def test_sections_are_frozen_and_say_less_than_they_hold() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.vocab_size = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert "type=" not in repr(TINY)
    assert repr(TINY).startswith("LlamaConfig(bos_token_id=1, eos_token_id=2, hidden_act='silu', hidden_size=16")


def _allows(schema: dict[str, Any], node: dict[str, Any], value: Any) -> bool:
    """Whether a JSON Schema of ours lets a value be: keys, kinds, words and types, as an editor would say."""
    if "$ref" in node:
        return _allows(schema, schema["$defs"][node["$ref"].rpartition("/")[2]], value)
    if "anyOf" in node:
        return any(_allows(schema, part, value) for part in node["anyOf"])
    if "const" in node or "enum" in node:
        return value in node.get("enum", [node.get("const")])
    kinds = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "null": type(None), "array": list}
    if node.get("type") == "object" and "properties" in node:
        keys = (
            isinstance(value, dict)
            and set(value) <= set(node["properties"])
            and set(node.get("required", [])) <= set(value)
        )
        return keys and all(_allows(schema, node["properties"][key], below) for key, below in value.items())
    if node.get("type") == "array":
        return isinstance(value, list) and all(_allows(schema, node["items"], item) for item in value)
    return "type" not in node or node["type"] == "object" or isinstance(value, kinds[node["type"]])


def test_editors_accept_the_tutorials_file_and_see_mistakes() -> None:
    schema = json_schema()
    tree = read(TUTORIAL.read_text(encoding="utf-8"), source="f")
    assert _allows(schema, schema, tree)
    assert schema["$schema"].startswith("https://json-schema.org/")
    for path, value in (("tokens", {"train_stepz": 3}), ("general", {"project": 3})):
        assert not _allows(schema, schema, {**tree, path: {**tree[path], **value}})
    tree["model"]["model_config"]["hidden_sise"] = 3
    assert not _allows(schema, schema, tree)


def test_every_path_can_be_completed() -> None:
    paths = field_paths()
    assert len(paths) == len(set(paths))
    assert {"tokens.train_steps", "data_stages.0.data.dataset.text_file", "model.model_config.n_embd"} <= set(paths)
