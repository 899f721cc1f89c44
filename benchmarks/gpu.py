"""Tokens/s, MFU, memory and time to the first step on GPUs, beside torchtitan where that is installed.

usage: python -m benchmarks.gpu [--only NAME ...] [--set KEY=VALUE ...] [--out FOLDER] [--no-trace] [--no-peer]

Each run is a process of its own, training as `pentode train` does: real optimizer, clipping, data order, records. Speed
is the median of its iteration lines after a warm-up; then a few steps more are traced, of models whose steps
are replayed as the launch of each kernel. Everything is printed, and written to FOLDER/gpu.jsonl. Without --only, the
runs of as many GPUs as there are, or fewer. 8B with all states takes more than 80 GB a GPU, 8B16 is half of its layers.
"""

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.shapes import CASES, EVERY, LLAMA, SEQUENCE, Case

PEER = Path(__file__).with_name("titan.py")
FIRST = {"pentode": re.compile(r"iteration: 1 /"), "torchtitan": re.compile(r"step:\s*1\s")}


@dataclass
class Figures:
    """What a run found. Milliseconds by kind are those of one step, on the first GPU."""

    who: str
    tokens_per_second: float = 0.0  # of one GPU
    step_ms: float = 0.0
    mfu: float = 0.0  # attention in full, as torchtitan and Nanotron count
    mfu_causal: float = 0.0
    peak_gib: float = 0.0
    first_step_s: float = 0.0
    kinds: dict[str, float] = field(default_factory=dict)
    kernels: list[tuple[str, float, int]] = field(default_factory=list)


def main() -> None:
    """Time what is asked for and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], choices=list(CASES), help="which runs; all, if none is named")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of the config")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--no-trace", action="store_true")
    parser.add_argument("--no-peer", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    print("run | who | tokens/s/GPU | step, ms | MFU full | MFU causal | peak, GiB | first step, s | a step's time, ms")
    with (asked.out / "gpu.jsonl").open("a", encoding="utf-8") as file:
        for name in asked.only or [name for name, case in CASES.items() if case.gpus <= torch.cuda.device_count()]:
            case = CASES[name]
            ours = run_ours(
                name, case, changes=asked.set, trace=not asked.no_trace, log=asked.out / f"{_file(name)}.log"
            )
            found = [ours]
            if not asked.no_peer and case.titan is not None and importlib.util.find_spec("torchtitan"):
                found.append(run_titan(case, asked.out / f"{_file(name)}-titan.log"))
            if not asked.no_peer and case.shape == "gpt2":
                found.append(run_bare(case, asked.out / f"{_file(name)}-bare.log"))
            for figures in found:
                file.write(json.dumps({"run": name, "set": asked.set, **asdict(figures)}) + "\n")
                file.flush()
                print(f"{name} | {line(figures)}", flush=True)
            if len(found) == 2 and found[1].tokens_per_second:
                print(f"{name} | ratio {ours.tokens_per_second / found[1].tokens_per_second:.3f}", flush=True)


def line(f: Figures) -> str:
    """A run's figures, for the terminal."""
    kinds = " ".join(f"{kind} {ms:.1f}" for kind, ms in f.kinds.items() if ms >= 0.05)
    return (
        f"{f.who} | {f.tokens_per_second:,.0f} | {f.step_ms:.2f} | {f.mfu:.1%} | {f.mfu_causal:.1%} | "
        f"{f.peak_gib:.1f} | {f.first_step_s:.1f} | {kinds}"
    )


def run_ours(name: str, case: Case, *, changes: list[str], trace: bool, log: Path) -> Figures:
    """A run of Pentode in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--name", name, "--folder", folder, *(["--trace"] if trace else []), *changes]
        command = _launched(case.gpus, ["-m", "benchmarks.gpu_run", *options])
        first = _logged(command, log, FIRST["pentode"])
        found = Path(folder) / "figures.json"
        figures = Figures("pentode", **json.loads(found.read_text())) if found.exists() else Figures("pentode, failed")
        figures.first_step_s = first
    return figures


def run_titan(case: Case, log: Path) -> Figures:
    """The same shape with torchtitan; its MFU counts attention in full."""
    assert case.shape in LLAMA, f"torchtitan has no {case.shape}"
    assert case.titan is not None, "torchtitan is no peer of this run"
    sequences, layout = case.micro_batch * case.micro_batches, case.parallelism
    pipelined = "pp" in layout  # there a step's micro-batches are one local batch
    options = {
        "--training.seq_len": SEQUENCE,
        "--training.local_batch_size": sequences if pipelined else case.titan_micro_batch or case.micro_batch,
        "--training.global_batch_size": sequences * layout.get("dp", 1),
        "--training.steps": case.steps,
        "--metrics.log_freq": EVERY,
    }
    if pipelined:
        options["--parallelism.pipeline_parallel_microbatch_size"] = case.micro_batch
    given = [str(word) for option in options.items() for word in option]
    command = [str(PEER), case.shape, *given, "--compile.enable", *case.titan]
    first = _logged(_launched(case.gpus, command, torchrun=True), log, FIRST["torchtitan"])
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    rows = re.findall(r"step:\s*(\d+).*?memory:\s*([\d.]+)GiB.*?tps:\s*([\d,]+).*?mfu:\s*([\d.]+)%", text)
    rows = [row for row in rows if int(row[0]) > case.warm_up]
    if not rows:
        return Figures("torchtitan, failed", first_step_s=first)
    speed = statistics.median(float(row[2].replace(",", "")) for row in rows)
    return Figures(
        "torchtitan",
        tokens_per_second=speed,
        step_ms=sequences * SEQUENCE / speed * 1e3 * layout.get("dp", 1) / case.gpus,
        mfu=statistics.median(float(row[3]) for row in rows) / 100,
        peak_gib=max(float(row[1]) for row in rows),
        first_step_s=first,
    )


def run_bare(case: Case, log: Path) -> Figures:
    """A bare, compiled loop of GPT-2 on the same batch."""
    _logged([sys.executable, "-m", "benchmarks.bare_gpt_gpu", "--batch", str(case.micro_batch)], log, FIRST["pentode"])
    found = re.search(r"bare: ([\d,]+) tokens/s, ([\d.]+) ms", log.read_text(errors="replace"))
    if found is None:
        return Figures("bare loop, failed")
    return Figures("bare loop", tokens_per_second=float(found[1].replace(",", "")), step_ms=float(found[2]))


def _file(name: str) -> str:
    return name.replace(" ", "-")


def _launched(gpus: int, command: list[str], *, torchrun: bool = False) -> list[str]:
    if gpus == 1 and not torchrun:
        return [sys.executable, *command]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", *command]


def _logged(command: list[str], log: Path, first: re.Pattern[str]) -> float:
    """Run a command, its output into a file; seconds until a line of it matched, 0 if none did."""
    begun, found = time.perf_counter(), 0.0
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None, "the pipe was asked for"
        for text in process.stdout:
            file.write(text)
            if not found and first.search(text):
                found = time.perf_counter() - begun
        process.wait()
    return found


if __name__ == "__main__":
    main()
