"""One training step, whole, the same for every layout (design 1.1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pentode.dist import collectives
from pentode.dist.mesh import Mesh
from pentode.optim import clip
from pentode.parallel.batch import Batch
from pentode.run.build import Run
from pentode.train.sanity import check_batches, check_gradients, check_weights


@dataclass(frozen=True)
class StepResult:
    """What a step found, still on the device: nothing waits for the host until the log asks.

    numbers  [2]: `loss`, mean over all valid tokens of the global batch; `norm` of the whole gradient, before clipping
    """

    numbers: Tensor

    @classmethod
    def of(cls, loss: Tensor, norm: Tensor) -> "StepResult":
        """The result with these, both 0-d."""
        return cls(torch.stack([loss, norm.to(loss.dtype)]))

    @property
    def loss(self) -> Tensor:
        """0-d."""
        return self.numbers[0]

    @property
    def norm(self) -> Tensor:
        """0-d."""
        return self.numbers[1]


def at_once() -> None:
    """Nothing need be waited for."""


def train_step(
    run: Run,
    batches: Sequence[Batch],
    *,
    learning_rate: float | Tensor,
    before_update: Callable[[], object] = at_once,
) -> StepResult:
    """Forward and backward over the micro-batches, clip, update, publish.

    learning_rate  a number, or 0-d float64 on the device
    before_update  called when only the update is left: it waits for what still reads weights or optimizer states
    A step whose loss or norm is not finite changes nothing, nor does any step after it (`Run.healthy`).
    """
    check_weights(run)
    check_batches(run, batches)
    tokens = valid_tokens(batches, run.mesh)
    per_token = 1 / tokens.to(run.loss_dtype)
    run.master.start_step(len(batches), loss_scale=per_token)
    loss = run.pipeline.forward_backward(batches, scale=per_token)
    run.master.finish_gradients()
    check_gradients(run)

    loss, squared_norm = world_sums(loss, clip.squared_norm(run.master), run.mesh)
    norm = squared_norm.sqrt()
    run.healthy &= torch.isfinite(loss) & torch.isfinite(norm)
    scale = clip.clip_scale(norm, run.config.optimizer.clip_grad)
    before_update()
    run.optimizer.step(learning_rate=learning_rate, scale=scale, finite=run.healthy, stepped=run.master.send)
    return StepResult.of(loss, norm)


def world_sums(loss: Tensor, squared_norm: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """The sums of all ranks' parts of the loss and of the squared norm, 0-d, in one message.

    The ranks of tp hold the same loss: the first one's counts.
    """
    wide = torch.promote_types(loss.dtype, squared_norm.dtype)
    both = torch.stack([loss.to(wide) * (mesh.tp.rank == 0), squared_norm.to(wide)])
    total, square = collectives.sum_(both, mesh.world)
    return total.to(loss.dtype), square.to(squared_norm.dtype)


def valid_tokens(batches: Sequence[Batch], mesh: Mesh) -> Tensor:
    """How many tokens of the whole global batch have a label, 0-d int64; counted before the first forward.

    At least 1, so that a batch without labels has the loss 0. The ranks of a replica count the same tokens; summed
    over `world` all the same, since a message over `data` would queue behind the weights that are on their way.
    """
    count = torch.stack([batch.valid() for batch in batches]).sum()
    return (collectives.sum_(count, mesh.world) // mesh.model.size).clamp(min=1)
