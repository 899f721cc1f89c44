"""A config for a model of which nothing is known but its shape."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pentode.config.kinds.shape import Shape
from pentode.config.load import config_from_dict
from pentode.config.schema import Config
from pentode.errors import ConfigError


def config_of(shape: Shape, dtype: torch.dtype) -> Config:
    """A config that has the model; what it says of training are beginnings for its reader to change."""
    fields: Any = asdict(shape)  # pyright: ignore[reportArgumentType]
    return _config(fields, str(dtype).removeprefix("torch."), sequence_length=shape.max_positions)


def shape_of(model_config: dict[str, Any], *, said_by: Path) -> Shape:
    """The shape that a model's section describes, in any spelling; ConfigError where no model can have it."""
    try:
        return _config(model_config, "float32", sequence_length=1).model.model_config
    except ConfigError as error:
        raise ConfigError([f"{said_by}: {problem}" for problem in error.problems]) from error


def _config(model_config: dict[str, Any], dtype: str, *, sequence_length: int) -> Config:
    return config_from_dict(
        {
            "general": {"project": "converted", "run": "converted", "step": 0, "consumed_train_samples": 0},
            "parallelism": {"dp": 1, "pp": 1, "tp": 1},
            "model": {
                "dtype": dtype,
                "init_method": {"std": 0.02},
                "model_config": model_config,
            },
            "checkpoints": {"checkpoints_path": "checkpoints", "checkpoint_interval": 1000},
            "tokens": {
                "sequence_length": sequence_length,
                "train_steps": 1,
                "micro_batch_size": 1,
                "batch_accumulation_per_replica": 1,
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
                "learning_rate_scheduler": {"learning_rate": 1e-5},
            },
            "data_stages": [{"name": "none", "start_training_step": 1, "data": {"dataset": None}}],
        }
    )
