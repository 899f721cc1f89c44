"""Hugging Face's weights to ours and back in memory, through the files that the library reads and writes."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pentode.checkpoint.hf import hf_weights
from pentode.checkpoint.names import their_tensors
from pentode.nn.names import NameTable
from pentode.parallel.spec import ParamSpec


def from_hf(names: NameTable, theirs: Mapping[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    """Our tensors from theirs."""
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: x.detach().clone() for name, x in theirs.items()}, Path(folder) / "model.safetensors")
        weights = hf_weights(Path(folder), names, tied=tied)
        return {name: weights.whole(name) for name in weights.tensors}


def to_hf(names: NameTable, ours: Mapping[str, Tensor], *, specs: Mapping[str, ParamSpec]) -> dict[str, Tensor]:
    """Their tensors from ours."""
    found = {}
    for name, of, block, transposed in their_tensors(names, specs):
        part: torch.Tensor = block.view(ours[of], start=(0,) * ours[of].dim())
        found[name] = part.T if transposed else part
    return found
