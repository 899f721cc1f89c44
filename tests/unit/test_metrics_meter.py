"""Speed from time: what counts as a step's time, and what the work is divided by."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pentode.metrics.meter import Meter, Work
from pentode.metrics.peak_flops import peak_flops

STEP = Work(tokens=1024, flops=4e12, causal_flops=3e12)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class At:
    """A moment in the work of a device that keeps the time of the clock."""

    seconds: float

    def seconds_since(self, earlier: "At") -> float:
        return self.seconds - earlier.seconds


def a_meter(clock: Clock, *, peak: float | None = None) -> Meter:
    return Meter(
        At(clock.now),
        global_batch_size=8,
        world_size=4,
        peak_flops=peak,
        clock=clock,
    )


def test_speed_is_work_over_time_over_devices() -> None:
    clock = Clock()
    meter = a_meter(clock, peak=10e12)
    clock.now += 0.5
    meter.step_ended(At(clock.now))
    record = meter.record(1, work=STEP, consumed_tokens=1024, lm_loss=5.0, lr=1e-3)
    assert record.elapsed_time_per_iteration_ms == pytest.approx(500)
    assert record.tokens_per_sec == pytest.approx(2048)
    assert record.tokens_per_sec_per_gpu == pytest.approx(512)
    assert record.model_tflops_per_gpu == record.hardware_tflops_per_gpu == pytest.approx(2.0)
    assert record.mfu == pytest.approx(0.2)
    assert record.mfu_causal == pytest.approx(0.15)
    clock.now += 0.5
    meter.step_ended(At(clock.now))
    record = meter.record(2, work=replace(STEP, recomputed=STEP.flops / 4), consumed_tokens=1024, lm_loss=5.0, lr=1e-3)
    assert record.model_tflops_per_gpu == pytest.approx(2.0)
    assert record.hardware_tflops_per_gpu == pytest.approx(2.5)


def test_evaluation_and_checkpoints_belong_to_no_step() -> None:
    clock = Clock()
    meter = a_meter(clock)
    clock.now += 1
    with meter.outside():
        clock.now += 30
    with suppress(KeyError), meter.outside():
        clock.now += 30
        raise KeyError
    clock.now += 1
    meter.step_ended(At(clock.now))
    record = meter.record(1, work=STEP, consumed_tokens=1, lm_loss=5.0, lr=1e-3)
    assert record.elapsed_time_per_iteration_ms == pytest.approx(2000)


def test_each_record_begins_the_next_steps_time() -> None:
    clock = Clock()
    meter = a_meter(clock)
    clock.now += 5
    meter.start(At(clock.now))
    clock.now += 1
    meter.step_ended(At(clock.now))
    record = meter.record(1, work=STEP, consumed_tokens=1, lm_loss=5.0, lr=1e-3)
    assert record.elapsed_time_per_iteration_ms == pytest.approx(1000)
    for _ in range(3):
        clock.now += 2
        meter.step_ended(At(clock.now))
    longer = Work(tokens=2048, flops=8e12, causal_flops=6e12)
    several = meter.record(4, work=STEP + longer + longer, consumed_tokens=1, lm_loss=5.0, lr=1e-3, steps=3)
    assert several.elapsed_time_per_iteration_ms == pytest.approx(2000)
    assert several.tokens_per_sec == pytest.approx((1024 + 2048 + 2048) / 6)
    assert several.model_tflops_per_gpu == pytest.approx((4 + 8 + 8) / 6 / 4)


def test_time_outside_belongs_to_no_step_though_the_record_before_it_is_written_after_it() -> None:
    clock = Clock()
    meter = a_meter(clock)
    for _ in range(2):
        clock.now += 2
        meter.step_ended(At(clock.now))
    with meter.outside():
        clock.now += 30
    clock.now += 2
    meter.step_ended(At(clock.now))
    clock.now += 30  # whenever records are written
    for step in (1, 2, 3):
        record = meter.record(step, work=STEP, consumed_tokens=1, lm_loss=5.0, lr=1e-3)
        assert record.elapsed_time_per_iteration_ms == pytest.approx(2000)


def test_a_clock_that_stands_still_breaks_nothing() -> None:
    clock = Clock()
    meter = a_meter(clock)
    meter.step_ended(At(clock.now))
    assert meter.record(1, work=STEP, consumed_tokens=1, lm_loss=5.0, lr=1e-3).tokens_per_sec is not None


def test_without_a_known_peak_there_is_no_mfu() -> None:
    clock = Clock()
    meter = a_meter(clock)
    meter.step_ended(At(clock.now))
    record = meter.record(1, work=STEP, consumed_tokens=1, lm_loss=5.0, lr=1e-3)
    assert record.mfu is record.mfu_causal is None


def test_the_disk_is_looked_at_only_when_asked(tmp_path: Path) -> None:
    clock = Clock()
    meter = a_meter(clock)
    for _ in range(2):
        meter.step_ended(At(clock.now))
    assert meter.record(1, work=STEP, consumed_tokens=1, lm_loss=5.0, lr=1e-3).hd_total_memory_tb is None
    record = meter.record(2, work=STEP, consumed_tokens=1, lm_loss=5.0, lr=1e-3, disk=tmp_path)
    assert record.hd_total_memory_tb is not None
    assert record.hd_total_memory_tb >= (record.hd_free_memory_tb or 0) > 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD EPYC 9554 64-Core Processor", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_the_peak_is_the_devices_own_or_none(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
