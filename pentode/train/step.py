"""One training step, whole, the same for every layout (design 1.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pentode.dist import collectives
from pentode.dist.mesh import Axis
from pentode.optim.clip import clip_scale, gradient_norm
from pentode.parallel.batch import Batch
from pentode.parallel.pipeline.runner import run_program
from pentode.run.build import Run


@dataclass
class StepResult:
    """What a step found, still on the device: nothing waits for the host until the log asks.

    loss  0-d, mean over all valid tokens of the global batch
    norm  0-d, of the whole gradient, before clipping
    """

    loss: Tensor
    norm: Tensor


def train_step(run: Run, batches: Sequence[Batch], *, learning_rate: float) -> StepResult:
    """Forward and backward over the micro-batches, clip, update, publish.

    A step whose loss or norm is not finite changes nothing, nor does any step after it (`Run.healthy`).
    """
    tokens = valid_tokens(batches, run.mesh.data)
    run.master.start_step(len(batches))
    loss = run_program(run.program, run.stages, batches, scale=1 / tokens.to(run.loss_dtype))
    run.master.finish_gradients()

    loss = collectives.sum_(loss, run.mesh.data)
    norm = gradient_norm(run.master, run.mesh)
    run.healthy &= torch.isfinite(loss) & torch.isfinite(norm)
    scale = clip_scale(norm, run.config.optimizer.clip_grad)
    run.optimizer.step(learning_rate=learning_rate, scale=scale, finite=run.healthy)
    run.master.publish()
    return StepResult(loss, norm)


def valid_tokens(batches: Sequence[Batch], data: Axis) -> Tensor:
    """How many tokens of the whole global batch have a label, 0-d int64; counted before the first forward.

    At least 1, so that a batch without labels has the loss 0.
    """
    count = torch.stack([batch.valid() for batch in batches]).sum()
    return collectives.sum_(count, data).clamp(min=1)
