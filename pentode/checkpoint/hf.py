"""A Hugging Face folder, read: the shape that config.json tells, and where in its safetensors each weight lies."""

from pathlib import Path
from typing import Any

import torch

from pentode.checkpoint.folder import reason
from pentode.checkpoint.manifest import parse_json
from pentode.checkpoint.names import our_tensors
from pentode.checkpoint.stored import InFile, StoredTensor, Weights
from pentode.checkpoint.tensor_file import open_tensor_file
from pentode.config.kinds.shape import Shape
from pentode.config.schema import ModelConfig
from pentode.config.section import marker, members
from pentode.errors import CheckpointError, ConfigError
from pentode.nn.names import NameTable

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # names the file of each tensor, where there are several files
PICKLED = "pytorch_model*.bin"


def is_hf_folder(folder: Path) -> bool:
    """Whether the folder has what a model of Hugging Face's has, or had before safetensors."""
    return (folder / CONFIG).is_file() and (_has_weights(folder) or any(folder.glob(PICKLED)))


def hf_shape(folder: Path) -> Shape:
    """The shape that config.json describes; ConfigError for a model that is not built here."""
    found = read_json(folder / CONFIG)
    kinds: dict[str, Any] = {marker(kind)[1]: kind for kind in members(ModelConfig)}
    name = found.get("model_type")
    if name not in kinds:
        raise ConfigError([f"{folder / CONFIG}: model_type: {name!r} is not built yet; {' or '.join(kinds)} is"])
    try:
        shape: Shape = kinds[name].from_hf(found)
        sizes = shape.parameter_count(), shape.head_dim
    except ConfigError as error:
        raise ConfigError([f"{folder}: {problem}" for problem in error.problems]) from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError([f"{folder / CONFIG}: its numbers are not those of a model ({error})"]) from error
    if min(sizes) < 1:
        raise ConfigError([f"{folder / CONFIG}: its numbers are not those of a model"])
    return shape


def hf_weights(folder: Path, names: NameTable, *, tied: bool) -> Weights:
    """The weights in the folder, by our names; no more than headers is read. Raises CheckpointError."""
    theirs = {name: StoredTensor.of(tensor) for name, tensor in _tensors(folder).items()}
    tensors = our_tensors(names, theirs, tied=tied, where=str(folder))
    for tensor in tensors.values():
        for box in tensor.boxes:
            dtype = box.tensor.dtype
            if not dtype.is_floating_point or dtype.itemsize < torch.bfloat16.itemsize:
                raise CheckpointError(
                    f"{box.tensor.path}: it holds weights of {str(dtype).removeprefix('torch.')}; quantized weights "
                    "are not read"
                )
    return Weights(str(folder), CONFIG, tensors)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that somebody else wrote; CheckpointError where it is none."""
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}); fetch it again") from error


def _tensors(folder: Path) -> dict[str, InFile]:
    """All tensors by Hugging Face's names, from one file or as the index says."""
    if not _has_weights(folder):
        raise CheckpointError(f"{folder}: its weights are pickled, which is never read; save them as safetensors")
    if not (folder / INDEX).exists():
        return dict(open_tensor_file(folder / WEIGHTS).tensors)
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{folder / INDEX}: its weight_map does not name a file for each tensor")
    found: dict[str, InFile] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX}: it names {file!r}, which is not in the folder")
        tensors = open_tensor_file(folder / file).tensors
        missing = sorted(name for name, place in places.items() if place == file and name not in tensors)
        if missing:
            raise CheckpointError(f"{folder / file}: {missing[0]} is not there, but {INDEX} says so")
        found |= {name: tensor for name, tensor in tensors.items() if places.get(name, file) == file}
    return found


def _has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()
