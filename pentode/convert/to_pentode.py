"""Weights written as a checkpoint of step 0, a tensor at a time."""

import platform
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pentode.checkpoint import storage
from pentode.checkpoint.manifest import FORMAT_VERSION, MANIFEST, STATE, Manifest, json_bytes
from pentode.checkpoint.save import file_names
from pentode.checkpoint.stored import Weights
from pentode.checkpoint.stream import Wanted, write_stream
from pentode.config.dump import to_yaml
from pentode.config.kinds.shape import Shape
from pentode.run.bare_config import config_of
from pentode.version import VERSION

NO_STEPS = {"step": 0, "consumed_samples": 0, "consumed_tokens": 0}


def write_checkpoint(
    folder: Path, shape: Shape, weights: Weights, *, dtype: torch.dtype, files: Mapping[str, bytes]
) -> None:
    """Write an empty folder full: weights in `dtype`, no optimizer's state, a config that has the shape, `files`."""
    config = config_of(shape, dtype)
    wanted = {name: Wanted(tensor.global_shape, dtype) for name, tensor in weights.tensors.items()}

    def make(name: str) -> Tensor:
        return weights.whole(name, dtype)

    file = file_names([{"weights": True}], 0)["weights"]
    facts = {file: write_stream(folder / file, wanted, make)}
    versions = {"pentode": VERSION, "torch": torch.__version__, "python": platform.python_version()}
    state = {"train": NO_STEPS, "updates": 0, "versions": versions, "step": 0, "format_version": FORMAT_VERSION}
    small = {**files, STATE: json_bytes(state), "config.yaml": to_yaml(config).encode()}
    for name, data in sorted(small.items()):
        facts[name] = storage.write(folder / name, [data])
    storage.write(folder / MANIFEST, [Manifest(0, facts).dump()])
