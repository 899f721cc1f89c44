"""A small config to change, and what loading it finds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pentode.config.load import config_from_dict, load_config
from pentode.config.schema import Config
from pentode.errors import ConfigError

SMALL = """\
general: {project: p}
parallelism: {dp: 1, tp: 1, pp: 1}
model:
  model_config: {hidden_size: 8, intermediate_size: 16, num_attention_heads: 2, num_hidden_layers: 1, vocab_size: 256}
  init_method: {std: 0.02}
checkpoints: {checkpoints_path: here, checkpoint_interval: 5}
tokens: {sequence_length: 8, train_steps: 10, micro_batch_size: 2, batch_accumulation_per_replica: 3}
optimizer:
  optimizer_factory: {adam_eps: 1e-8, adam_beta1: 0.9, adam_beta2: 0.95, torch_adam_is_fused: true}
  zero_stage: 0
  weight_decay: 0.1
  clip_grad: null
  accumulate_grad_in_fp32: true
  learning_rate_scheduler: {learning_rate: 3e-4}
data_stages:
- {name: a, start_training_step: 1, data: {dataset: null}}
"""


def small(**sections: dict[str, Any]) -> dict[str, Any]:
    """SMALL as a dict, with keys of whole sections replaced."""
    data = yaml.safe_load(SMALL.replace("3e-4", "0.0003").replace("1e-8", "1.0e-8"))
    for section, changes in sections.items():
        data.setdefault(section, {}).update(changes)
    return data


def loaded(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, text, *overrides)
    return [problem.replace(f"{tmp_path}/", "") for problem in error.value.problems]


def outcome(call: Callable[[], object]) -> list[str]:
    """The problems that a call found; any other exception is a failure."""
    try:
        call()
    except ConfigError as error:
        return error.problems
    return []


def problems_of(data: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        config_from_dict(data)
    return error.value.problems
