"""Compiles a model's blocks: one graph for all blocks of a kind (design 1.4)."""

from collections.abc import Iterable

import torch

from pentode import device as devices
from pentode.nn.causal_lm import CausalLM, run_block


def compile_blocks(models: Iterable[CausalLM], *, mode: str, device: torch.device) -> bool:
    """Compile each block where `mode` says so: "on", "off", or "auto", which means on a GPU. Returns whether it did."""
    wanted = mode == "on" or (mode == "auto" and devices.is_gpu(device))
    if wanted:
        torch.compiler.reset()  # the limit of graphs is shared by all models that a process ever compiled
        compiled = torch.compile(run_block, fullgraph=True)
        for model in models:
            model.run_block = compiled
    return wanted
