"""Steps whose numbers are still on the device, and the records made of them: one wait for the host a flush."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path

from pentode import device as devices
from pentode.errors import NonFiniteError
from pentode.metrics.meter import Meter, Work
from pentode.metrics.peak_flops import peak_flops
from pentode.metrics.sinks import Sinks
from pentode.run.build import Run

MOMENT = 0.1  # seconds for which what was seen of a GPU's memory is good enough
FIRST_STEPS = 5  # the steps before this one print memory and disk, as Nanotron's do


@dataclass(frozen=True)
class Done:
    """One finished step: what the host knows of it, and its loss and norm, on their way from the device."""

    step: int
    learning_rate: float
    consumed_tokens: int
    numbers: devices.Fetched


class Journal:
    """Collects steps, and writes their records when asked to."""

    def __init__(self, run: Run, sinks: Sinks, root: Path) -> None:
        self.run, self.sinks, self.root = run, sinks, root
        self.done: list[Done] = []
        self.show_disk = True
        self.meter = Meter(
            devices.Moment(run.device),
            global_batch_size=run.config.global_batch_size,
            world_size=run.world.size,
            peak_flops=peak_flops(devices.name(run.device)),
        )
        self._work_of: dict[int, Work] = {}  # by sequence length
        self._seen: tuple[float, devices.Memory] | None = None  # what a GPU's memory held, and when
        self._wanted = 0  # how many of the steps kept are to be written when the device is busy with another

    def add(self, done: Done) -> None:
        """Keep a step until its record is written; those that were wanted before it are now."""
        self.done.append(done)
        self.meter.step_ended(done.numbers.arrived)
        if self._wanted:
            self._flush(self._wanted)

    def want(self) -> None:
        """Have the records of all steps kept written: at once, or where a device works beside the host, under its work.

        There the next step is given to it first, so that it does not wait for what the host writes.
        """
        if devices.is_gpu(self.run.device):
            self._wanted = len(self.done)
        else:
            self.flush()

    @contextmanager
    def kept_if_this_fails(self) -> Iterator[None]:
        """Write the records that wait for the next step if what is done within, that step, ends the run."""
        try:
            yield
        except BaseException:
            with suppress(Exception):  # what ended the run is told, not that its numbers are lost with it
                self._flush(self._wanted)
            raise

    def flush(self, *, val_loss: float | None = None) -> None:
        """Read the steps since the last flush from the device and give their records to the sinks.

        Their time and speed are means over them. Raises NonFiniteError for the first step that changed nothing, when
        those before it are written.
        """
        self._flush(len(self.done), val_loss=val_loss)

    def _flush(self, count: int, *, val_loss: float | None = None) -> None:
        """Write the records of the first `count` steps kept."""
        self._wanted = 0
        if not count:
            return
        rows = [done.numbers.wait() for done in self.done[:count]]
        good = next((i for i, row in enumerate(rows) if not all(map(math.isfinite, row))), count)
        if good > 0:
            self._write(rows[:good], self.done[:count], val_loss=val_loss if good == count else None)
        self.done = self.done[good:]
        if good < count:
            loss, norm = rows[good]
            step = self.done[0].step
            raise NonFiniteError(
                f"step {step}: the loss is {loss}, the gradient's norm {norm}; the weights are those of step "
                f"{step - 1}, and nothing was saved since; lower optimizer.learning_rate_scheduler.learning_rate or "
                "look at the data, and start again from the last checkpoint"
            )

    def _write(self, rows: list[list[float]], ran: list[Done], *, val_loss: float | None) -> None:
        """Give the sinks the records of the first steps that ran, one for each row of loss and norm."""
        done = ran[: len(rows)]
        last, memory = done[-1], self._memory()
        record = self.meter.record(
            last.step,
            steps=len(ran),  # all of them took their time, those that are not written too
            work=reduce(add, (self._work(kept.step) for kept in ran)),
            consumed_tokens=last.consumed_tokens,
            lm_loss=rows[-1][0],
            grad_norm=rows[-1][1],
            lr=last.learning_rate,
            val_loss=val_loss,
            memory_allocated=None if memory is None else memory.allocated,
            memory_reserved=None if memory is None else memory.peak_reserved,
            disk=self.root if (self.show_disk or last.step < FIRST_STEPS) and self.root.exists() else None,
        )
        self.show_disk = False
        for earlier, (loss, norm) in zip(done[:-1], rows[:-1], strict=True):
            self.sinks.log(
                replace(
                    record,
                    step=earlier.step,
                    lm_loss=loss,
                    grad_norm=norm,
                    lr=earlier.learning_rate,
                    consumed_tokens=earlier.consumed_tokens,
                    val_loss=None,
                )
            )
        self.sinks.log(record)

    def _memory(self) -> devices.Memory | None:
        """What a GPU's memory held a moment ago: to ask takes as long as a small step."""
        now = time.monotonic()
        if devices.is_gpu(self.run.device) and (self._seen is None or now > self._seen[0] + MOMENT):
            self._seen = now, devices.memory(self.run.device)
        return None if self._seen is None else self._seen[1]

    def _work(self, step: int) -> Work:
        """What `step` did; a stage may have a sequence length of its own."""
        length = self.run.feed.stage_at(step).sequence_length
        if length not in self._work_of:
            config = self.run.config
            shape, batch = config.model.model_config, config.global_batch_size
            recomputed = (
                shape.recomputed_flops_per_sequence(length) if config.parallelism.recompute_layer is True else 0.0
            )
            self._work_of[length] = Work(
                tokens=batch * length,
                flops=batch * shape.flops_per_sequence(length),
                causal_flops=batch * shape.causal_flops_per_sequence(length),
                recomputed=batch * recomputed,
            )
        return self._work_of[length]
