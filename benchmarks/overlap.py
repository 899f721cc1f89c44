"""How much of the communication is hidden behind work, option by option, on two GPUs; and whether an option costs time.

usage: torchrun --nproc-per-node=2 -m benchmarks.overlap [--layers 8] [--only NAME]

Layers of the 8B shape of Llama, sequences of 4096 random tokens, bfloat16. Each option runs beside the same layout
without it. In a trace of torch.profiler, communication is hidden while another kernel runs. A pipeline's step is also
compared with its schedule's own length: the simulator's, for stages timed by themselves.
"""

import argparse
import gc
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.shapes import optimizer
from benchmarks.trace import Span, length, shared, union
from pentode import device as devices
from pentode import log
from pentode.config.load import config_from_dict
from pentode.config.schema import Config
from pentode.dist import collectives, launch
from pentode.dist.collectives import gather_objects, wait_for_all
from pentode.dist.p2p import Form
from pentode.optim import clip
from pentode.parallel.batch import Batch, batch_of
from pentode.parallel.pipeline.simulate import Transfer, simulate
from pentode.run import build
from pentode.run.build import Run
from pentode.train.step import train_step

SEQUENCE, VOCABULARY = 4096, 32000
WARM_UP, TIMED, TRACED = 4, 8, 3


@dataclass(frozen=True)
class Option:
    """An overlap: the layout that has it, and what is changed to be without it (nothing: it cannot be)."""

    layout: dict[str, Any]
    without: dict[str, Any] | None
    micro_batches: int = 1
    micro_batch_size: int = 2
    covered: float = 1.0  # the part of the communication that it is about


ONE_BUCKET = {"model.ddp_bucket_cap_mb": 1 << 20}
TP = {"tp": 2, "tp_mode": "REDUCE_SCATTER", "tp_linear_async_communication": True}
OPTIONS = {
    "dp2: all-reduce under backward": Option({"dp": 2}, ONE_BUCKET),
    "dp2, ZeRO-1: reduce-scatter under backward, all-gather under forward": Option({"dp": 2, "zero": 1}, ONE_BUCKET),
    "tp2, REDUCE_SCATTER: gathers and scatters under products": Option(TP, {"tp_linear_async_communication": False}),
    "tp2, ALL_REDUCE: all-reduce under products in backward": Option(
        TP | {"tp_mode": "ALL_REDUCE"}, {"tp_linear_async_communication": False}, covered=0.5
    ),
    "pp2, 1f1b: sends and receives": Option({"pp": 2, "pp_engine": "1f1b"}, None, micro_batches=8, micro_batch_size=1),
    "pp2, interleaved: sends and receives": Option(
        {"pp": 2, "pp_engine": "interleaved"}, None, micro_batches=8, micro_batch_size=1
    ),
}


@dataclass
class Measured:
    """One run, on this rank: median milliseconds a step, and of one traced step those of communication and work."""

    step: float
    communication: float
    hidden: float
    by_kind: dict[str, tuple[float, float]] = field(default_factory=dict)


def main() -> None:
    """Measure each option and print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    here = launch.world()
    device = devices.pick("cuda", local_rank=here.local_rank)
    log.setup(level="error", rank=here.rank)
    launch.connect(here, backend=devices.backend(device), device=device)
    if here.rank == 0:
        print("option | step without, ms | step with, ms | ratio | communication, ms | hidden")
    for name, option in OPTIONS.items():
        if asked.only in name:
            line = _compare(option, here, device, layers=asked.layers)
            if here.rank == 0:
                print(f"{name} | {line}", flush=True)
    launch.disconnect()


def _compare(option: Option, here: launch.World, device: torch.device, *, layers: int) -> str:
    plain = None
    if option.without is not None:
        plain, _ = _measure(_config(option, option.without, layers), here, device)
    found, exposed = _measure(_config(option, {}, layers), here, device)
    before = (
        f"{plain.step:.1f} | {found.step:.1f} | {found.step / plain.step:.3f}" if plain else f"- | {found.step:.1f} | -"
    )
    if exposed is not None:
        moving, exposed_ms, ideal = exposed
        return (
            f"{before} | {found.communication:.2f} ({moving:.2f} alone) | {found.hidden / found.communication:.0%} "
            f"(the schedule alone: {ideal:.1f} ms, so {exposed_ms / ideal:.1%} is exposed)"
        )
    found.communication *= option.covered
    kinds = ", ".join(f"{kind} {total:.2f} ms {hidden / total:.0%}" for kind, (total, hidden) in found.by_kind.items())
    before_hidden = f", without: {plain.hidden / plain.communication:.0%}" if plain and plain.communication else ""
    return f"{before} | {found.communication:.2f} | {found.hidden / found.communication:.0%}{before_hidden} ({kinds})"


def _config(option: Option, changes: dict[str, Any], layers: int) -> Config:
    parallelism = {"dp": 1, "tp": 1, "pp": 1, **option.layout, **{k: v for k, v in changes.items() if "." not in k}}
    zero = parallelism.pop("zero", 0)
    model = {"dtype": "bfloat16", **{k.removeprefix("model."): v for k, v in changes.items() if "." in k}}
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    shape |= {"num_hidden_layers": layers, "vocab_size": VOCABULARY, "max_position_embeddings": SEQUENCE}
    return config_from_dict(
        {
            "general": {"project": "overlap"},
            "parallelism": parallelism,
            "model": model | {"model_config": shape, "init_method": {"std": 0.02}},
            "checkpoints": {"checkpoints_path": "unused", "checkpoint_interval": 1000},
            "tokens": {
                "sequence_length": SEQUENCE,
                "train_steps": 1000,
                "micro_batch_size": option.micro_batch_size,
                "batch_accumulation_per_replica": option.micro_batches,
            },
            "optimizer": optimizer(zero) | {"learning_rate_scheduler": {"learning_rate": 3e-4}},
            "data_stages": [{"name": "random", "start_training_step": 1, "data": {"dataset": None}}],
        }
    )


def _measure(
    config: Config, here: launch.World, device: torch.device
) -> tuple[Measured, tuple[float, float, float] | None]:
    """A run's figures, and of a pipeline: its messages alone, what is exposed of them, the step without, all in ms."""
    mesh = build.build_mesh(config)
    stages = build.build_stages(config, mesh, device)
    no_feed: Any = None  # batches are made here
    run = build.assemble(config, here, mesh, device, no_feed, stages)
    build.initialise_weights(run)
    batches = _batches(config, mesh.data.rank, device)
    found = _timed(run, batches, device)
    found.step = max(gather_objects(found.step, mesh.world))
    exposed = _exposed(run, found, batches) if mesh.pp.size > 1 else None
    del run, stages
    gc.collect()
    torch.cuda.empty_cache()
    return found, exposed


def _batches(config: Config, rank: int, device: torch.device) -> list[Batch]:
    generator = torch.Generator().manual_seed(rank)
    size, count = config.tokens.micro_batch_size, config.tokens.batch_accumulation_per_replica
    rows = torch.randint(VOCABULARY, (count, size, SEQUENCE + 1), generator=generator)
    return [batch_of(row, samples=torch.arange(size) + i * size).to(device) for i, row in enumerate(rows)]


def _timed(run: Run, batches: list[Batch], device: torch.device) -> Measured:
    def step() -> None:
        train_step(run, batches, learning_rate=1e-4)

    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(TIMED):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        devices.synchronize(device)
        wait_for_all()
        begin.record()
        step()
        step()  # two, so that what goes on under the next forward counts once
        end.record()
        devices.synchronize(device)
        times.append(begin.elapsed_time(end) / 2)
    work, kinds = _traced(step, device)
    moving = union(span for kind in kinds.values() for span in kind)
    per_step = 1e-3 / TRACED
    by_kind = {
        kind: (length(union(spans)) * per_step, shared(union(spans), work) * per_step) for kind, spans in kinds.items()
    }
    return Measured(statistics.median(times), length(moving) * per_step, shared(moving, work) * per_step, by_kind)


def _traced(step: Callable[[], object], device: torch.device) -> tuple[list[Span], dict[str, list[Span]]]:
    """When kernels worked, and when what kind of communication went on, in TRACED steps."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        for _ in range(TRACED):
            step()
        devices.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy")]
    main, _ = Counter(event["args"]["stream"] for event in events).most_common(1)[0]
    work: list[Span] = []
    kinds: dict[str, list[Span]] = {}
    for event in events:
        name, span = str(event["name"]), (event["ts"], event["ts"] + event["dur"])
        if name.startswith("nccl"):
            kinds.setdefault(name.removeprefix("ncclDevKernel_").split("(")[0].split("_")[0], []).append(span)
        elif "barrier" in name:
            kinds.setdefault("meeting", []).append(span)
        elif "signal" in name:
            continue  # waits for another rank's work, or says that its own is done
        elif event["cat"] == "gpu_memcpy" and event["args"]["stream"] != main:
            kinds.setdefault("copy", []).append(span)
        else:
            work.append(span)
    return union(work), kinds


def _exposed(run: Run, found: Measured, batches: list[Batch]) -> tuple[float, float, float]:
    own = {}
    for number in run.stages:
        own |= _alone(run, number, batches[0])
    durations = {key: ms for rank in gather_objects(own, run.mesh.pp) for key, ms in rank.items()}
    ideal = simulate(run.pipeline.schedule, durations=durations).makespan + _update(run)
    messages = sum(isinstance(action, Transfer) for action in run.pipeline.program)
    moving = messages * _message(run, next(iter(run.stages.values())).takes(batches[0])[0])
    return moving, max(found.step - ideal, 0.0), ideal


def _alone(run: Run, number: int, batch: Batch) -> dict[tuple[str, int], float]:
    """Milliseconds of a stage's forward, and of its backward with what moves gradients, where nobody communicates."""
    stage = run.stages[number]
    form = stage.takes(batch)[0]
    run.master.start_step(WARM_UP + TIMED + 1)  # one more than come: the last would start to reduce
    x = None if stage.part.first else torch.randn(form.shape, dtype=form.dtype, device=batch.tokens.device)
    times: list[tuple[float, float]] = []
    for _ in range(WARM_UP + TIMED):
        x = x if x is None else x.detach().requires_grad_()
        begin, between, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        begin.record()
        y = stage(x, batch)
        between.record()
        torch.autograd.backward(y, torch.ones_like(y))
        end.record()
        torch.cuda.synchronize()
        times.append((begin.elapsed_time(between), between.elapsed_time(end)))
    forward, backward = (statistics.median(column) for column in zip(*times[WARM_UP:], strict=True))
    return {("F", number): forward, ("B", number): backward}


def _update(run: Run) -> float:
    """Milliseconds from the last gradient to the published weights."""
    times = []
    for _ in range(TIMED):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run.master.finish_gradients()
        square = clip.squared_norm(run.master)
        norm = collectives.sum_(square, run.mesh.world).sqrt()
        scale = clip.clip_scale(norm, 1.0)
        run.optimizer.step(learning_rate=0.0, scale=scale, finite=run.healthy, stepped=run.master.send)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def _message(run: Run, form: Form) -> float:
    """Milliseconds that one message takes from a rank to the next while nobody computes."""
    count, channels, pp = 20, run.pipeline.channels, run.mesh.pp
    tensor = torch.zeros(form.shape, dtype=form.dtype, device=run.device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for timed in (False, True):
        wait_for_all()
        devices.synchronize(run.device)
        begin.record() if timed else None
        for _ in range(count):
            if pp.rank == 0:
                channels.send((tensor,), to=1)
                channels.flush()
            else:
                channels.receive([form], source=0).wait()
        end.record()
        devices.synchronize(run.device)
    return max(gather_objects(begin.elapsed_time(end) / count, pp))


if __name__ == "__main__":
    main()
