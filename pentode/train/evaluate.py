"""The validation loss: mean over all valid tokens of the held-out micro-batches."""

from collections.abc import Iterable
from itertools import islice

import torch

from pentode.dist import collectives
from pentode.parallel.batch import Batch
from pentode.run.build import Run


@torch.no_grad()
def validation_loss(run: Run, batches: Iterable[Batch]) -> float | None:
    """Mean loss over `batches` without dropout, which changes nothing in the run; None where there is no label."""
    mesh, together = run.mesh, run.config.tokens.batch_accumulation_per_replica
    one = torch.ones((), dtype=run.loss_dtype, device=run.device)
    loss, tokens = torch.zeros_like(one), torch.zeros((), dtype=torch.int64, device=run.device)
    left = iter(batches)
    for stage in run.stages.values():
        stage.eval()
    while some := list(islice(left, together)):  # as many as a step has fill a pipeline as a step does
        loss += run.pipeline.forward(some, scale=one)
        tokens += torch.stack([batch.valid() for batch in some]).sum()
    for stage in run.stages.values():
        stage.train()
    loss = collectives.sum_(loss * (mesh.tp.rank == 0), mesh.world)
    tokens = collectives.sum_(tokens, mesh.data)
    return (loss / tokens).item() if tokens.item() else None
