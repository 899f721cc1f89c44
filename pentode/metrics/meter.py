"""Times steps, and turns a step's time into tokens/s, TFLOP/s and MFU."""

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from pentode.metrics.record import Record


@dataclass(frozen=True)
class Work:
    """What steps do, over all ranks: tokens; operations, forward and backward, attention in full and by half.

    recomputed  operations that are done a second time, so as not to keep their results; of the hardware's work alone
    """

    tokens: int
    flops: float
    causal_flops: float
    recomputed: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.tokens + other.tokens,
            self.flops + other.flops,
            self.causal_flops + other.causal_flops,
            self.recomputed + other.recomputed,
        )


class Moment(Protocol):
    """A moment in the work of a device."""

    def seconds_since(self, earlier: Self) -> float: ...


class Meter:
    """A clock over steps, which makes speeds of the work done.

    peak_flops  of one device (see peak_flops.py); None means that no MFU is given

    A step's time is that from the end of the step before it (or `start`) to its own, as the device saw them, less what
    ran inside `outside()` between: evaluation, checkpoints, sampling. When records are written does not matter: a host
    that is behind its device writes all of them late, but the last.
    """

    def __init__(
        self,
        began: Moment,
        *,
        global_batch_size: int,
        world_size: int,
        peak_flops: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.global_batch_size = global_batch_size
        self.world_size = world_size
        self.peak_flops = peak_flops
        self._clock = clock
        self._ended: deque[tuple[Moment, float]] = deque()  # of the steps without a record: when, and seconds outside
        self.start(began)

    def start(self, began: Moment) -> None:
        """Forget the time so far: the next step begins then."""
        self._began, self._outside = began, 0.0

    def step_ended(self, at: Moment) -> None:
        """A step has been given to the device, and ends then."""
        self._ended.append((at, self._outside))
        self._outside = 0.0

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Time spent in this block belongs to no step."""
        entered = self._clock()
        try:
            yield
        finally:
            self._outside += self._clock() - entered

    def record(
        self,
        step: int,
        *,
        work: Work,
        consumed_tokens: int,
        lm_loss: float,
        lr: float,
        grad_norm: float | None = None,
        val_loss: float | None = None,
        memory_allocated: int | None = None,
        memory_reserved: int | None = None,
        disk: Path | None = None,
        steps: int = 1,
    ) -> Record:
        """The record of `step`, whose end the caller has waited for.

        `steps`, `work`: how many ended since the last record, and all that they did; the time given is a step's mean.
        `disk`: a folder on the disk to look at; given at the steps whose line shall show memory (Nanotron: the first
        four, and after a checkpoint).
        """
        seconds = max(self._seconds(steps), 1e-9)  # a clock may tick coarsely; nothing divides by zero
        tera_seconds = seconds * self.world_size * 1e12
        total, used, free = shutil.disk_usage(disk) if disk else (None, None, None)
        return Record(
            step=step,
            lm_loss=lm_loss,
            val_loss=val_loss,
            grad_norm=grad_norm,
            lr=lr,
            consumed_tokens=consumed_tokens,
            global_batch_size=self.global_batch_size,
            tokens_per_sec=work.tokens / seconds,
            tokens_per_sec_per_gpu=work.tokens / seconds / self.world_size,
            model_tflops_per_gpu=work.flops / tera_seconds,
            hardware_tflops_per_gpu=(work.flops + work.recomputed) / tera_seconds,
            elapsed_time_per_iteration_ms=seconds / steps * 1000,
            cuda_memory_allocated=memory_allocated,
            cuda_max_memory_reserved=memory_reserved,
            mfu=self._utilisation(work.flops, seconds),
            mfu_causal=self._utilisation(work.causal_flops, seconds),
            hd_total_memory_tb=total,
            hd_used_memory_tb=used,
            hd_free_memory_tb=free,
            wall_time=time.time(),
        )

    def _seconds(self, steps: int) -> float:
        """What the next steps without a record took; they have one now."""
        began, outside = self._began, 0.0
        for _ in range(steps):
            self._began, before = self._ended.popleft()
            outside += before
        return self._began.seconds_since(began) - outside

    def _utilisation(self, flops: float, seconds: float) -> float | None:
        if self.peak_flops is None:
            return None
        return flops / seconds / self.world_size / self.peak_flops
