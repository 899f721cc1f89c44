"""A valid config as a dict, with values changed by path, and the problems that are then found."""

from typing import Any

import pytest

from pentode.config.load import config_from_dict
from pentode.config.tree import path_of
from pentode.errors import ConfigError

LLAMA = {"type": "llama", "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
LLAMA |= {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
GPT2 = {"type": "gpt2", "n_embd": 16, "n_head": 4, "n_layer": 2, "vocab_size": 64, "n_positions": 32}
TEXT = {"text_file": "t.txt"}
HF_TEXT = {"hf_dataset_or_datasets": "t.jsonl"}


def data(**changes: Any) -> dict[str, Any]:
    """A valid config as a dict, with `a__b=value` changed at path a.b."""
    made: dict[str, Any] = {
        "general": {"project": "p"},
        "parallelism": {"dp": 1, "tp": 1, "pp": 1},
        "model": {"model_config": dict(LLAMA), "init_method": {"std": 0.02}},
        "checkpoints": {"checkpoints_path": "here", "checkpoint_interval": 5},
        "tokens": {
            "sequence_length": 8,
            "train_steps": 10,
            "micro_batch_size": 2,
            "batch_accumulation_per_replica": 3,
        },
        "optimizer": {
            "optimizer_factory": {"name": "sgd"},
            "zero_stage": 0,
            "weight_decay": 0.1,
            "clip_grad": 1.0,
            "accumulate_grad_in_fp32": True,
            "learning_rate_scheduler": {"learning_rate": 1e-3},
        },
        "data_stages": [{"name": "a", "start_training_step": 1, "data": {"dataset": dict(TEXT)}}],
    }
    for path, value in changes.items():
        node: Any = made
        *parents, key = path_of(path.replace("__", "."))
        for parent in parents:
            node = node[parent] if isinstance(node, list) else node.setdefault(parent, {})
        node[key] = value
    return made


def found(**changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        config_from_dict(data(**changes))
    return error.value.problems
