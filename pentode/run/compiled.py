"""How a model's blocks are run: compiled, one graph for all blocks of a kind (design 1.4), and recomputed."""

from collections.abc import Iterable

import torch

from pentode import device as devices
from pentode.config.schema import Config
from pentode.nn.causal_lm import CausalLM, run_block
from pentode.parallel.recompute import recomputing


def prepare_blocks(models: Iterable[CausalLM], config: Config, *, device: torch.device) -> bool:
    """Set how the models run their blocks, as the config says. Returns whether they are compiled."""
    block = recomputing(run_block, config.parallelism.recompute_layer)
    mode = config.model.compile
    wanted = mode == "on" or (mode == "auto" and devices.is_gpu(device))
    if wanted:
        torch.compiler.reset()  # the limit of graphs is shared by all models that a process ever compiled
        block = torch.compile(block, fullgraph=True)
    for model in models:
        model.run_block = block
    return wanted
