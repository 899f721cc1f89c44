"""The validation loss: mean over all valid tokens of the held-out micro-batches."""

from collections.abc import Iterable

import torch

from pentode.dist import collectives
from pentode.parallel.batch import Batch
from pentode.run.build import Run


@torch.no_grad()
def validation_loss(run: Run, batches: Iterable[Batch]) -> float | None:
    """Mean loss over `batches` without dropout, which changes nothing in the run; None where there is no batch."""
    model = run.stages[0].eval()
    found = [(model(None, batch), batch.valid()) for batch in batches]
    model.train()
    if not found:
        return None
    loss, tokens = (torch.stack(numbers).sum() for numbers in zip(*found, strict=True))
    return (collectives.sum_(loss, run.mesh.data) / collectives.sum_(tokens, run.mesh.data)).item()
