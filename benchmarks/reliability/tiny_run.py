"""The run that all campaigns damage, kill and stop: a tiny GPT-2 on two ranks, and what it is when left alone."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.reliability import launcher
from benchmarks.reliability.ranks import Prepare, Ranks
from pentode.checkpoint.folder import Checkpoint, newest
from pentode.metrics.jsonl import read_rows
from tests.helpers.tiny import tiny_yaml

REFERENCE = "reference.json"
INTERVAL = 3  # steps between checkpoints
EXACT = ("step", "lm_loss", "val_loss", "grad_norm", "lr", "consumed_tokens")  # what no clock has a part in
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2, ZeRO-1, float32": {"parallelism__dp": 2, "optimizer__zero_stage": 1},
    "dp2, ZeRO-1, bfloat16": {"parallelism__dp": 2, "optimizer__zero_stage": 1, "model__dtype": "bfloat16"},
    "tp2, float32, engine torch": {"parallelism__tp": 2, "checkpoints__checkpointing_engine": "torch"},
    "pp2, bfloat16": {"parallelism__pp": 2, "model__dtype": "bfloat16"},
    "one process, bfloat16": {"model__dtype": "bfloat16"},
    "dp2 x tp2, ZeRO-1, bfloat16": {
        "parallelism__dp": 2,
        "parallelism__tp": 2,
        "optimizer__zero_stage": 1,
        "model__dtype": "bfloat16",
    },
}
*UP_TO_TWO_RANKS, FOUR_RANKS = LAYOUTS
TWO_RANKS = UP_TO_TWO_RANKS[:-1]
ZERO = "dp2, ZeRO-1, float32"


def write_config(folder: Path, *, layout: str = ZERO, steps: int = 18, **changes: Any) -> Path:
    """tiny.yaml in `folder`, which is made, and the text that it trains on."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokens__train_steps": steps,
        "tokens__micro_batch_size": 2,
        "tokens__batch_accumulation_per_replica": 2 if "pp2" in layout else 1,
        "checkpoints__checkpoint_interval": INTERVAL,
        "checkpoints__keep_last": 1,  # a save is followed by a prune
    }
    return tiny_yaml(folder, **(settings | LAYOUTS[layout] | changes))


def start(
    config: Path,
    root: Path,
    *overrides: str,
    world: int = 2,
    prepare: Prepare | None = None,
    attach: Callable[[list[int]], object] | None = None,
) -> Ranks:
    """Train in `root`, or go on there. What is printed goes to `root`.log; see `Ranks` for the rest."""

    def before(rank: int) -> None:
        without_reports(rank)
        if prepare is not None:
            prepare(rank)

    arguments = _arguments(config, root, *overrides)
    return Ranks(arguments, output=log_of(root), world=world, prepare=before, attach=attach)


def launch(config: Path, root: Path, *, world: int = 2) -> Ranks:
    """`start` by torch's launcher."""
    return launcher.start(_arguments(config, root), output=log_of(root), world=world, prepare=without_reports)


def _arguments(config: Path, root: Path, *overrides: str) -> list[str]:
    return ["train", str(config), f"checkpoints.checkpoints_path={root}", *overrides]


def train(
    config: Path,
    root: Path,
    *overrides: str,
    world: int = 2,
    prepare: Prepare | None = None,
    attach: Callable[[list[int]], object] | None = None,
) -> list[int]:
    """`start`, and the exit codes at the end."""
    return start(config, root, *overrides, world=world, prepare=prepare, attach=attach).finish()


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


def last_row(root: Path) -> int:
    """The step of the last row of the metrics; 0 if there is none."""
    found = read_rows(root / "metrics.jsonl")
    return int(found[-1]["step"] or 0) if found else 0


def last_step(root: Path) -> int:
    """The highest number of a checkpoint's folder; -1 if there is none."""
    with suppress(FileNotFoundError):
        return max((int(name) for name in os.listdir(root) if name.isdigit()), default=-1)
    return -1


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


def world_of(layout: str) -> int:
    """How many ranks a layout has."""
    return 2 if layout in TWO_RANKS else 4 if layout == FOUR_RANKS else 1


def config_of(prepared: Path, layout: str, **settings: Any) -> Path:
    """The config of a layout; the first to ask also has a run of it that nobody disturbs, whose end is kept."""
    folder = prepared / layout.replace(", ", "-").replace(" ", "")
    folder.mkdir(exist_ok=True)
    with (folder / ".asked").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of cases at a time, one makes it
        if not (folder / REFERENCE).exists():
            config = write_config(folder, layout=layout, **settings)
            codes = train(config, folder / "reference", world=world_of(layout))
            assert not any(codes), f"the undisturbed run ended with {codes}:\n{tail(folder / 'reference')}"
            (folder / REFERENCE).write_text(json.dumps(final_state(folder / "reference")))
    return folder / "tiny.yaml"


def reference(folder: Path) -> dict[str, Any]:
    """The final state of the run that nobody disturbed, kept beside its config."""
    return json.loads((folder / REFERENCE).read_text())


def leftovers(root: Path) -> list[str]:
    """What is on its way in or out in a run's folder, which after a start there is nothing."""
    return sorted(name for name in os.listdir(root) if name.startswith((".tmp-", ".old-", ".trash-")))


def copy(source: Path, target: Path) -> Path:
    """A copy of a run's folder."""
    return Path(shutil.copytree(source, target, symlinks=True))


def tail(root: Path, lines: int = 12) -> str:
    """The last lines that a run printed, for a problem's description."""
    return "\n".join(printed(root).splitlines()[-lines:])


def without_reports(rank: int) -> None:
    """Have a process make no report after a save and no sample at the end: they take ten times what all else takes."""
    import pentode.generate.closing
    import pentode.report.page

    pentode.report.page.write_report = lambda root: root
    pentode.generate.closing.closing_sample = lambda run, root: None


def as_expected(codes: Sequence[int], root: Path, folder: Path) -> str:
    """Empty if a run ended well, as the one in `folder` that nobody disturbed; else what is not so."""
    if any(codes):
        return f"the run ended with {list(codes)}:\n{tail(root)}"
    aside = [name for name in os.listdir(root) if name.startswith(".bad-")]
    return difference(final_state(root), reference(folder)) or ", ".join(leftovers(root) + aside)
