"""A tiny run in this process, and the batches of its steps."""

from pathlib import Path

from pentode.dist.launch import World
from pentode.parallel.batch import Batch
from pentode.run.build import Run, build, initialise_weights
from tests.helpers.tiny import tiny_config


def tiny_run(folder: Path, **changes: object) -> Run:
    """The run of `tiny_config`, ready for its first step."""
    run = build(tiny_config(folder, **changes), World(), first_step=1)
    initialise_weights(run)
    return run


def step_batches(run: Run, step: int) -> list[Batch]:
    """What a run of one stage trains on in `step`."""
    samples = (step - 1) * run.config.global_batch_size
    return run.feed.batches(step, consumed=samples, first_number=samples)
