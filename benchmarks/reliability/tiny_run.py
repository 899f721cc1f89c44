"""The run that all campaigns damage, kill and stop: a tiny GPT-2 on two ranks, and what it is when left alone."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reliability.ranks import Prepare, Ranks
from pentode.checkpoint.folder import Checkpoint, newest
from tests.helpers.tiny import tiny_yaml

INTERVAL = 3  # steps between checkpoints
EXACT = ("step", "lm_loss", "val_loss", "grad_norm", "lr", "consumed_tokens")  # what no clock has a part in
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2, ZeRO-1, float32": {"parallelism__dp": 2, "optimizer__zero_stage": 1},
    "dp2, ZeRO-1, bfloat16": {"parallelism__dp": 2, "optimizer__zero_stage": 1, "model__dtype": "bfloat16"},
    "tp2, float32": {"parallelism__tp": 2},
    "pp2, bfloat16": {"parallelism__pp": 2, "model__dtype": "bfloat16"},
}
ZERO = "dp2, ZeRO-1, float32"


def write_config(folder: Path, *, layout: str = ZERO, steps: int = 18, **changes: Any) -> Path:
    """tiny.yaml in `folder`, which is made, and the text that it trains on."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokens__train_steps": steps,
        "tokens__micro_batch_size": 2,
        "tokens__batch_accumulation_per_replica": 2 if "pp2" in layout else 1,
        "checkpoints__checkpoint_interval": INTERVAL,
    }
    return tiny_yaml(folder, **(settings | LAYOUTS[layout] | changes))


def start(config: Path, root: Path, *overrides: str, world: int = 2, prepare: Prepare | None = None) -> Ranks:
    """Train in `root`, or go on there. What is printed goes to `root`.log; reports and samples are not made."""
    arguments = ["train", str(config), f"checkpoints.checkpoints_path={root}", *overrides]
    return Ranks(arguments, output=log_of(root), world=world, prepare=lambda rank: _prepared(rank, prepare))


def train(config: Path, root: Path, *overrides: str, world: int = 2, prepare: Prepare | None = None) -> list[int]:
    """`start`, and the exit codes at the end."""
    return start(config, root, *overrides, world=world, prepare=prepare).finish()


def log_of(root: Path) -> Path:
    """Where a run's processes print."""
    return root.with_name(root.name + ".log")


def printed(root: Path) -> str:
    """What a run's processes printed."""
    return log_of(root).read_text(errors="replace") if log_of(root).exists() else ""


def final_state(root: Path) -> dict[str, Any]:
    """All of the newest checkpoint but the paths in its config, and the exact part of the metrics."""
    checkpoint = newest(root)
    assert checkpoint is not None, f"{root} holds no checkpoint"
    return {"step": checkpoint.step, "files": state_of(checkpoint), "metrics": metrics(root)}


def state_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The checksum of each file of a checkpoint but config.yaml, which names the run's folder."""
    return {name: facts.sha256 for name, facts in checkpoint.manifest.files.items() if name != "config.yaml"}


def metrics(root: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what a clock measured."""
    lines = (root / "metrics.jsonl").read_text().splitlines()
    return [{key: row[key] for key in EXACT} for row in map(json.loads, lines)]


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """In what one final state is not the other; empty if it is."""
    if found["step"] != expected["step"]:
        return f"ended at step {found['step']}, not {expected['step']}"
    files = sorted(name for name, sha in expected["files"].items() if found["files"].get(name) != sha)
    if files or found["files"].keys() != expected["files"].keys():
        return f"the last checkpoint's {', '.join(files) or 'list of files'} differ"
    for mine, other in zip(found["metrics"], expected["metrics"], strict=False):
        if mine != other:
            return f"metrics.jsonl has {mine}, not {other}"
    return "" if len(found["metrics"]) == len(expected["metrics"]) else "metrics.jsonl has other rows"


def keep_reference(folder: Path, *, config: Path) -> None:
    """Run undisturbed in `folder`/reference, and keep its final state."""
    root = folder / "reference"
    codes = train(config, root)
    assert codes == [0] * len(codes), f"the undisturbed run ended with {codes}:\n{printed(root)}"
    (folder / "reference.json").write_text(json.dumps(final_state(root)))


def reference(folder: Path) -> dict[str, Any]:
    """What `keep_reference` kept."""
    return json.loads((folder / "reference.json").read_text())


def leftovers(root: Path) -> list[str]:
    """What is on its way in or out in a run's folder, which after a start there is nothing."""
    return sorted(name for name in os.listdir(root) if name.startswith((".tmp-", ".old-", ".trash-")))


def copy(source: Path, target: Path) -> Path:
    """A copy of a run's folder."""
    return Path(shutil.copytree(source, target, symlinks=True))


def tail(root: Path, lines: int = 12) -> str:
    """The last lines that a run printed, for a problem's description."""
    return "\n".join(printed(root).splitlines()[-lines:])


def _prepared(rank: int, more: Callable[[int], object] | None) -> None:
    import pentode.generate.closing
    import pentode.report.page

    pentode.report.page.write_report = lambda root: root  # it takes ten times what a step takes
    pentode.generate.closing.closing_sample = lambda run, root: None
    if more is not None:
        more(rank)


def as_expected(codes: Sequence[int], root: Path, folder: Path) -> str:
    """Empty if a run ended well and as the reference did; else what is not so."""
    if any(codes):
        return f"the run ended with {list(codes)}:\n{tail(root)}"
    return difference(final_state(root), reference(folder)) or ", ".join(leftovers(root))
