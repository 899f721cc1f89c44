"""Steps whose numbers are still on the device, and the records made of them: one wait for the host a flush."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pentode import device as devices
from pentode.errors import NonFiniteError
from pentode.metrics.meter import Meter
from pentode.metrics.peak_flops import peak_flops
from pentode.metrics.sinks import Sinks
from pentode.run.build import Run
from pentode.train.step import StepResult

FIRST_STEPS = 5  # the steps before this one print memory and disk, as Nanotron's do


@dataclass(frozen=True)
class Done:
    """One finished step: what the host knows of it, and what only the device knows."""

    step: int
    learning_rate: float
    consumed_tokens: int
    result: StepResult


class Journal:
    """Collects steps, and writes their records when asked to."""

    def __init__(self, run: Run, sinks: Sinks, root: Path) -> None:
        config = run.config
        shape, length = config.model.model_config, config.tokens.sequence_length
        self.run, self.sinks, self.root = run, sinks, root
        self.done: list[Done] = []
        self.show_disk = True
        self.meter = Meter(
            flops=shape.flops_per_sequence(length) * config.global_batch_size,
            causal_flops=shape.causal_flops_per_sequence(length) * config.global_batch_size,
            global_batch_size=config.global_batch_size,
            sequence_length=length,
            world_size=run.world.size,
            peak_flops=peak_flops(devices.name(run.device)),
        )

    def add(self, done: Done) -> None:
        """Keep a step until the next flush."""
        self.done.append(done)

    def flush(self, *, val_loss: float | None = None) -> None:
        """Read the steps since the last flush from the device and give their records to the sinks.

        Their time is the mean over them. Raises NonFiniteError for the first step that changed nothing.
        """
        if not self.done:
            return
        numbers = torch.stack([torch.stack([d.result.loss, d.result.norm.to(d.result.loss.dtype)]) for d in self.done])
        rows = numbers.tolist()  # waits for the device
        self._check(rows)
        last, memory = self.done[-1], devices.memory(self.run.device)
        gpu = devices.is_gpu(self.run.device)
        record = self.meter.record(
            last.step,
            steps=len(self.done),
            consumed_tokens=last.consumed_tokens,
            lm_loss=rows[-1][0],
            grad_norm=rows[-1][1],
            lr=last.learning_rate,
            val_loss=val_loss,
            memory_allocated=memory.allocated if gpu else None,
            memory_reserved=memory.peak_reserved if gpu else None,
            disk=self.root if self.root.exists() and (self.show_disk or last.step < FIRST_STEPS) else None,
        )
        self.show_disk = False
        for done, (loss, norm) in zip(self.done[:-1], rows[:-1], strict=True):
            self.sinks.log(
                replace(
                    record,
                    step=done.step,
                    lm_loss=loss,
                    grad_norm=norm,
                    lr=done.learning_rate,
                    consumed_tokens=done.consumed_tokens,
                    val_loss=None,
                )
            )
        self.sinks.log(record)
        self.done.clear()

    def _check(self, rows: list[list[float]]) -> None:
        for done, (loss, norm) in zip(self.done, rows, strict=True):
            if not all(torch.isfinite(torch.tensor([loss, norm]))):
                raise NonFiniteError(
                    f"step {done.step}: the loss is {loss}, the gradient's norm {norm}; the weights are those of step "
                    f"{done.step - 1}, and nothing was saved since; lower optimizer.learning_rate_scheduler."
                    "learning_rate or look at the data, and start again from the last checkpoint"
                )
