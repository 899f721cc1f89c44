"""A Hugging Face folder: config.json and safetensors, read with all that is wrong told in a line, or written."""

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pentode.checkpoint import storage
from pentode.checkpoint.folder import reason
from pentode.checkpoint.layout import Saved
from pentode.checkpoint.manifest import parse_json
from pentode.checkpoint.save import write_tensors
from pentode.config.kinds.shape import Shape
from pentode.config.section import marker
from pentode.errors import CheckpointError, ConfigError
from pentode.models.registry import MODELS

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # names the file of each tensor, where there are several files
PICKLED = "pytorch_model*.bin"


def is_hf_folder(folder: Path) -> bool:
    """Whether the folder has what a model of Hugging Face's has, or had before safetensors."""
    return (folder / CONFIG).is_file() and (_has_weights(folder) or any(folder.glob(PICKLED)))


def read_shape(folder: Path) -> Shape:
    """The shape that config.json describes; ConfigError for a model that is not built here."""
    found = _json(folder / CONFIG)
    kinds = {marker(kind)[1]: kind for kind in MODELS}
    name = found.get("model_type")
    if name not in kinds:
        raise ConfigError([f"{folder / CONFIG}: model_type: {name!r} is not built yet; {' or '.join(kinds)} is"])
    try:
        shape = kinds[name].from_hf(found)
        sizes = shape.parameter_count(), shape.head_dim
    except ConfigError as error:
        raise ConfigError([f"{folder}: {problem}" for problem in error.problems]) from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError([f"{folder / CONFIG}: its numbers are not those of a model ({error})"]) from error
    if min(sizes) < 1:
        raise ConfigError([f"{folder / CONFIG}: its numbers are not those of a model"])
    return shape


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors by Hugging Face's names, from one file or as the index says."""
    if not _has_weights(folder):
        raise CheckpointError(f"{folder}: its weights are pickled, which is never read; save them as safetensors")
    if not (folder / INDEX).exists():
        return _tensors(folder / WEIGHTS)
    places = _json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{folder / INDEX}: its weight_map does not name a file for each tensor")
    found: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX}: it names {file!r}, which is not in the folder")
        tensors = _tensors(folder / file)
        missing = sorted(name for name, place in places.items() if place == file and name not in tensors)
        if missing:
            raise CheckpointError(f"{folder / file}: {missing[0]} is not there, but {INDEX} says so")
        found |= tensors
    return found


def write_model(folder: Path, shape: Shape, weights: Mapping[str, Tensor], *, dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors into an empty folder."""
    config = shape.to_hf() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    whole = {name: Saved.whole(tensor) for name, tensor in weights.items()}
    write_tensors(folder / WEIGHTS, whole, metadata={"format": "pt"})  # transformers asks for that
    storage.write(folder / CONFIG, [(json.dumps(config, indent=2) + "\n").encode()])


def _has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is not a regular file")
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}); fetch it again") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}); fetch it again") from error
