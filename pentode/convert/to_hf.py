"""Weights written as a Hugging Face folder, a tensor at a time."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pentode.checkpoint import storage
from pentode.checkpoint.hf import CONFIG, INDEX, WEIGHTS
from pentode.checkpoint.layout import Saved
from pentode.checkpoint.names import Theirs, their_tensors
from pentode.checkpoint.stored import Weights
from pentode.checkpoint.stream import Wanted, write_stream
from pentode.config.kinds.shape import Shape
from pentode.errors import ConfigError
from pentode.models.registry import model_for
from pentode.run.existing import specs_of_shape

SHARD = "5GB"  # as transformers cuts large models
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
GENERATION = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def shard_bytes(size: str) -> int:
    """Bytes of a size in words, as `5GB` or `200MiB`; ConfigError for other words."""
    found = re.fullmatch(r"(\d+)\s*([KMG]i?B)", size)
    if found is None or not int(found[1]):
        raise ConfigError([f"command line: --max-shard-size {size}: is no size; give one as {SHARD} or 200MiB"])
    return int(found[1]) * UNITS[found[2]]


def write_hf(
    folder: Path, shape: Shape, weights: Weights, *, dtype: torch.dtype, limit: int, files: Mapping[str, bytes]
) -> None:
    """Write an empty folder full: config.json, the weights in files of at most `limit` bytes, other `files`.

    One tensor is in memory at a time. A tensor larger than the limit has a file of its own.
    """
    config = shape.to_hf() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    theirs = {tensor.name: tensor for tensor in their_tensors(model_for(shape).HF_NAMES, specs_of_shape(shape))}
    wanted = {name: Wanted(tensor.shape, dtype) for name, tensor in theirs.items()}

    def make(name: str) -> Tensor:
        return _read(weights, theirs[name], dtype)

    shards, places = _shards(wanted, limit=limit), {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(names, file)
        part = {name: wanted[name] for name in names}
        write_stream(folder / file, part, make, metadata={"format": "pt"})  # transformers asks for that
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in wanted.values())
        storage.write(folder / INDEX, [_json({"metadata": {"total_size": total}, "weight_map": places})])
    storage.write(folder / CONFIG, [_json(config)])
    ids = {key: config[key] for key in IDS if config.get(key) is not None}
    if ids:
        storage.write(folder / GENERATION, [_json(ids)])
    for name, data in files.items():
        storage.write(folder / name, [data])


def _read(weights: Weights, theirs: Theirs, dtype: torch.dtype) -> Tensor:
    """One of their tensors, read from the block of ours that it is."""
    tensor = torch.empty(theirs.shape, dtype=dtype)
    piece = (theirs.block.start, tensor.T if theirs.transposed else tensor)
    weights.read(theirs.ours, Saved(weights.tensors[theirs.ours].global_shape, [piece]), rounded=True)
    return tensor


def _shards(wanted: Mapping[str, Wanted], *, limit: int) -> list[list[str]]:
    """The names in runs, each of at most `limit` bytes where one tensor is not more."""
    shards: list[list[str]] = []
    size = 0
    for name, tensor in wanted.items():
        if not shards or size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _json(what: Mapping[str, object]) -> bytes:
    return (json.dumps(what, indent=2) + "\n").encode()
