"""A tiny run: a config that trains in a second on one thread, and how tests change it."""

import json
import random
from pathlib import Path
from typing import Any

from pentode.config.dump import save_yaml
from pentode.config.load import config_from_dict
from pentode.config.schema import Config

WORDS = "the model reads a line of text and writes the next one while the loss falls step by step".split()


def text(*, words: int = 2000, seed: int = 0) -> str:
    """English-like text of its own."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def tiny_dict(folder: Path, **changes: Any) -> dict[str, Any]:
    """A tiny GPT-2 on a text file in `folder`, as the full schema has it; `changes` are `a__b__c=value`."""
    path = folder / "text.txt"
    if not path.exists():
        path.write_text(text(), encoding="utf-8")
    data: dict[str, Any] = {
        "general": {"project": "tests", "run": "tiny", "device": "cpu"},
        "parallelism": {"dp": 1, "pp": 1, "tp": 1},
        "model": {
            "dtype": "float32",
            "init_method": {"std": 0.05},
            "model_config": {
                "type": "gpt2",
                "vocab_size": -1,
                "n_positions": 16,
                "n_embd": 16,
                "n_layer": 2,
                "n_head": 2,
                "embd_pdrop": 0.1,
                "resid_pdrop": 0.1,
                "attn_pdrop": 0.1,
            },
        },
        "checkpoints": {"checkpoints_path": str(folder / "run"), "checkpoint_interval": 4},
        "tokens": {
            "sequence_length": 16,
            "train_steps": 12,
            "micro_batch_size": 4,
            "batch_accumulation_per_replica": 2,
            "val_check_interval": 6,
            "limit_val_batches": 2,
        },
        "optimizer": {
            "optimizer_factory": {
                "name": "adamW",
                "adam_eps": 1e-8,
                "adam_beta1": 0.9,
                "adam_beta2": 0.95,
                "torch_adam_is_fused": True,
            },
            "zero_stage": 0,
            "weight_decay": 0.1,
            "clip_grad": 1.0,
            "accumulate_grad_in_fp32": True,
            "learning_rate_scheduler": {"learning_rate": 1e-2, "lr_warmup_steps": 2, "lr_decay_style": "cosine"},
        },
        "data_stages": [
            {
                "name": "text",
                "start_training_step": 1,
                "data": {"dataset": {"text_file": str(path)}, "validation_fraction": 0.1, "num_loading_workers": 0},
            }
        ],
    }
    for dotted, value in changes.items():
        *parents, key = dotted.split("__")
        node: Any = data
        for parent in parents:
            node = node[int(parent)] if parent.isdigit() else node[parent]
        node[key] = value
    return data


def tiny_config(folder: Path, **changes: Any) -> Config:
    """The config of `tiny_dict`."""
    return config_from_dict(tiny_dict(folder, **changes))


def tiny_yaml(folder: Path, **changes: Any) -> Path:
    """The config of `tiny_dict`, written to a file."""
    path = folder / "tiny.yaml"
    save_yaml(tiny_config(folder, **changes), path)
    return path


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path, step: int | str) -> bytes:
    """The bytes of a checkpoint's weights."""
    return b"".join(path.read_bytes() for path in sorted((run / str(step)).glob("weights-*.safetensors")))
