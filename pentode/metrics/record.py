"""What one training step is known by: the row that every sink writes."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Record:
    """One step's numbers, exact; None where not known. The order is that of the keys in metrics.jsonl."""

    step: int
    lm_loss: float | None
    val_loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    consumed_tokens: int
    global_batch_size: int  # samples
    tokens_per_sec: float | None = None
    tokens_per_sec_per_gpu: float | None = None
    model_tflops_per_gpu: float | None = None
    hardware_tflops_per_gpu: float | None = None
    elapsed_time_per_iteration_ms: float | None = None
    cuda_memory_allocated: int | None = None  # bytes
    cuda_max_memory_reserved: int | None = None  # bytes
    mfu: float | None = None  # a fraction of the device's peak, attention counted in full
    mfu_causal: float | None = None  # the same with causal attention counted as half
    hd_total_memory_tb: int | None = None  # bytes, whatever the name says: it is Nanotron's
    hd_used_memory_tb: int | None = None
    hd_free_memory_tb: int | None = None
    wall_time: float | None = None  # seconds since 1970

    def row(self) -> dict[str, float | int | None]:
        """The record as JSON can hold it: what is not a finite number is None."""
        values = vars(self)
        return {
            name: None if value is not None and not math.isfinite(value) else value for name, value in values.items()
        }
