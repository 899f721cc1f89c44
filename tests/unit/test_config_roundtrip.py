"""Whatever a config holds loads back as itself, and whatever a file holds is loaded or refused in our words."""

import contextlib
import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pentode.config.dump import to_dict, to_yaml
from pentode.config.load import config_from_dict, load_config
from pentode.config.tree import assign, path_of, tree_of
from pentode.config.yaml_reader import read
from pentode.errors import ConfigError
from tests.helpers.config import SMALL, outcome, small


@settings(max_examples=60, deadline=None)
@given(
    st.text(max_size=12),
    st.integers(-(2**40), 2**40),
    st.floats(1e-30, 1e30),
    st.floats(0, 0.999),
    st.sampled_from(["float32", "float64", "bfloat16"]),
    st.lists(st.sampled_from(["norm", ".*bias", "^a$", "\\d"]), max_size=3),
    st.lists(st.text(), min_size=1, max_size=3),
)
def test_any_config_loads_back_as_itself(
    text: str, seed: int, rate: float, fraction: float, dtype: str, patterns: list[str], names: list[str]
) -> None:
    data = small(
        general={"project": text, "seed": seed, "run": text},
        model={"dtype": dtype},
        optimizer={"weight_decay_exclude_named_params": patterns, "learning_rate_scheduler": {"learning_rate": rate}},
        tokenizer={"tokenizer_name_or_path": text},
    )
    dataset = {"hf_dataset_or_datasets": dict.fromkeys(names, rate), "text_column_name": text}
    data["data_stages"] = [
        {"name": text, "start_training_step": 1, "data": {"dataset": dataset, "validation_fraction": fraction}},
        {"name": text + "2", "start_training_step": 3, "data": {"dataset": {"text_file": text}}},
    ]
    config = config_from_dict(data)
    assert config_from_dict(read(to_yaml(config), source="f")) == config
    assert config_from_dict(to_dict(config)) == config


LINES = SMALL.splitlines()
JUNK = st.one_of(
    st.sampled_from(
        ["", "  ", "- ", "x", ": ", "{", "}", "null", "-1", "1e999", ".nan", "true", "[]", "data_stages", "[1]"]
    ),
    st.sampled_from(["model", "tokens", "is_llama_config: true", "type: gpt2", "n_embd: 3", "dataset_folder: {a: b}"]),
    st.text(max_size=4),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(LINES) - 1), st.integers(0, 60), st.integers(0, 20), JUNK), max_size=4))
def test_a_damaged_file_is_loaded_or_refused_in_our_words(tmp_path_factory: Any, changes: list[Any]) -> None:
    lines = list(LINES)
    for line, start, length, junk in changes:
        lines[line] = lines[line][:start] + junk + lines[line][start + length :]
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_text("\n".join(lines))
    found = outcome(lambda: load_config(path))
    assert all(problem.startswith(str(path)) and "\n" not in problem for problem in found)


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 300),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(["sgd", "llama"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["type", "name", "std", "path", "n_embd", "is_x_config", "seed", "data"]), inner
        ),
    ),
    max_leaves=6,
)
SECTIONS = """general model.model_config model.init_method model.model_config.rope_scaling optimizer.optimizer_factory
optimizer data_stages data_stages.0 data_stages.0.data.dataset tokens.train_steps data lighteval checkpoints profiler
tokenizer model.model_config.num_attention_heads model.model_config.vocab_size"""
PLACES = st.sampled_from(re.split(r"\s+", SECTIONS))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(PLACES, VALUES, max_size=3))
def test_any_data_is_a_config_or_refused_in_our_words(changes: dict[str, Any]) -> None:
    data = tree_of(small())
    for place, value in changes.items():
        assign(data, path_of(place), tree_of(value), place=None)
    with contextlib.suppress(ConfigError):
        config = config_from_dict(data)
        assert config_from_dict(to_dict(config)) == config
