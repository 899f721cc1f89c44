"""tokens/s of configs/nano.yaml through Pentode, against a bare PyTorch loop of the same model, alternating in one run.

usage: python -m benchmarks.cpu_nano [--rounds 6] [--steps 10]
Each side does `steps` steps in turn, `rounds` times, after one round of warm-up; the medians are compared.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.bare_gpt import bare_loop
from pentode import log
from pentode.config.load import load_config
from pentode.dist.launch import World
from pentode.metrics.sinks import open_sinks
from pentode.run.build import build, initialise_weights
from pentode.train.journal import Journal
from pentode.train.loop import one_step
from pentode.train.replay import Steps
from pentode.train.state import TrainState


def pentode_loop(root: Path) -> tuple[Callable[[], None], dict[str, int]]:
    """A function that does one step as `pentode train` does, records included, and the model's sizes."""
    config = load_config(Path("configs/nano.yaml"), [f"checkpoints.checkpoints_path={root}", "general.device=cpu"])
    run = build(config, World(), first_step=1)
    initialise_weights(run)
    shape, tokens = run.config.model.model_config, run.config.tokens
    state = TrainState()
    steps = Steps(run)
    journal = Journal(run, open_sinks(run.config, run="cpu_nano"), root)

    def step() -> None:
        journal.add(one_step(run, state, steps))
        if state.step % config.logging.iteration_step_info_interval == 0:
            journal.flush()

    sizes = {"vocab": shape.vocab_size, "batch": run.config.global_batch_size, "block": tokens.sequence_length}
    return step, sizes | {"layers": shape.num_layers, "heads": shape.heads, "width": shape.width}


def main() -> None:
    """Measure and print one line a side, then their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10)
    asked = parser.parse_args()
    log.setup(level="error")
    with tempfile.TemporaryDirectory() as folder:
        ours, sizes = pentode_loop(Path(folder))
        data = torch.randint(sizes["vocab"], (500_000,))
        sides = {"pentode": ours, "bare": bare_loop(data, **sizes)}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for round_number in range(asked.rounds + 1):
            for name, step in sides.items():
                for _ in range(asked.steps):
                    began = time.perf_counter()
                    step()
                    if round_number > 0:
                        seconds[name].append(time.perf_counter() - began)
    tokens = sizes["batch"] * sizes["block"]
    speed = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    for name, value in speed.items():
        print(f"{name:>8}: {value:,.0f} tokens/s")
    print(f"   ratio: {speed['pentode'] / speed['bare']:.3f}")


if __name__ == "__main__":
    main()
