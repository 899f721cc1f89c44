"""One run of benchmarks/gpu.py: trains, and leaves its figures in FOLDER/figures.json.

As the commands do, it imports what it needs when it runs.
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.shapes import CASES, config_of
from pentode.config.load import load_config
from pentode.garbage import uncollected

if TYPE_CHECKING:
    from pentode.run.build import Run

TRACED = 3


def main() -> None:
    """Train what is named, with overrides of its config, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, choices=list(CASES))
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("changes", nargs="*")
    asked = parser.parse_args()
    first = int(os.environ.get("RANK", "0")) == 0
    file = asked.folder / f"config-{os.environ.get('RANK', '0')}.yaml"
    file.write_text(yaml.safe_dump(config_of(CASES[asked.name], asked.folder / "run")))
    where: dict[str, Any] = {}
    with uncollected():  # as the command does
        from pentode.train.start import start

        at_end = [lambda run, _: where.update(_trace(run))] if asked.trace else []
        start(load_config(file, asked.changes), at_end=at_end)
    if first:
        figures = _figures(asked.folder / "run", warm_up=CASES[asked.name].warm_up)
        (asked.folder / "figures.json").write_text(json.dumps(figures | where))


def _figures(folder: Path, *, warm_up: int) -> dict[str, float]:
    """Medians over the iteration lines after the warm-up."""
    records = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if record["step"] > warm_up]
    lines = {
        "tokens_per_second": "tokens_per_sec_per_gpu",
        "step_ms": "elapsed_time_per_iteration_ms",
        "mfu": "mfu",
        "mfu_causal": "mfu_causal",
    }
    found = {ours: statistics.median(record.get(theirs) or 0.0 for record in records) for ours, theirs in lines.items()}
    return found | {"peak_gib": max(record.get("cuda_max_memory_reserved") or 0 for record in records) / 2**30}


def _trace(run: "Run") -> dict[str, Any]:
    """Milliseconds by kind, and the longest kernels, of some steps more, which are not replayed, on the first batch."""
    from benchmarks.trace import breakdown, traced
    from pentode.train.step import train_step

    _mark(run)
    step = run.config.tokens.train_steps
    batches = [batch.to(run.device) for batch in run.feed.batches(step, consumed=0, first_number=0)]
    found = {}

    def again() -> None:
        train_step(run, batches, learning_rate=1e-5)

    again()
    kinds, kernels = breakdown(traced(again, steps=TRACED), steps=TRACED)
    run.feed.stop()
    found["kinds"], found["kernels"] = kinds, kernels
    return found


def _mark(run: "Run") -> None:
    """Give the ranges that a trace is read by to what is called from here on."""
    from torch.profiler import record_function

    from pentode.nn import causal_lm

    def marked(call: Any, name: str) -> Any:
        def within(*args: Any, **options: Any) -> Any:
            with record_function(name):
                return call(*args, **options)

        return within

    run.optimizer.step = marked(run.optimizer.step, "optimizer")
    run.master.finish_gradients = marked(run.master.finish_gradients, "optimizer")
    causal_lm.vocab_loss = marked(causal_lm.vocab_loss, "loss")


if __name__ == "__main__":
    main()
