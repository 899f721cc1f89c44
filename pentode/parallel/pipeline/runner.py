"""Runs a rank's program: the one interpreter of every schedule."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pentode.parallel.batch import Batch
from pentode.parallel.pipeline.schedules import Action


def run_program(
    program: Sequence[Action], stages: Mapping[int, nn.Module], batches: Sequence[Batch], *, scale: Tensor
) -> Tensor:
    """Do every action of `program`; gradients gather in the parameters.

    stages   this rank's stages by number; the last one returns the sum of its tokens' losses
    batches  the step's micro-batches
    scale    0-d, what the loss sum is multiplied by before backward: 1 / (valid tokens of the whole global batch)

    Returns the micro-batches' losses, scaled and summed, 0-d: this rank's part of the global mean loss.
    """
    outputs: dict[tuple[int, int], Tensor] = {}
    total = torch.zeros_like(scale)
    for action in program:
        key = (action.stage, action.micro_batch)
        if action.kind == "F":
            outputs[key] = stages[action.stage](None, batches[action.micro_batch]) * scale
            total += outputs[key].detach()
        else:
            outputs.pop(key).backward()
    return total
