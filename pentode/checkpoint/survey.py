"""What `pentode checkpoint` tells: a run's checkpoints, what is wrong with them, what one holds. No torch is needed."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pentode import log
from pentode.checkpoint.folder import Checkpoint, DamagedError, damages, find_checkpoint, reason, steps, with_manifest
from pentode.checkpoint.manifest import HIDDEN_NAME, MANIFEST, STEP_NAME, header_table
from pentode.config.load import load_config
from pentode.config.schema import Config
from pentode.errors import CheckpointError, ConfigError

CONFIG = "config.yaml"
HIDDEN = {"tmp": "unfinished", "old": "replaced", "bad": "quarantined"}  # what a name that begins with a dot says
COLUMNS = ("step", "bytes", "when", "layout", "status", "name")
UNKNOWN = "-"


@dataclass(frozen=True)
class Found:
    """A folder that is, was, or was to be a checkpoint.

    bytes    of its files on the disk
    when     it was completed, or last written to, in UTC
    layout   that of the run that saved it, by axis; None where its config cannot be read
    status   good (each checksum is right), complete (only sizes were compared), damaged, or by its name: unfinished
             (being written, or left by a crash), replaced (makes room for another of its step), quarantined
    damages  what is wrong, if it is damaged
    """

    name: str
    step: int
    bytes: int
    when: str
    layout: dict[str, int] | None
    status: str
    damages: list[str]


def survey(root: Path, *, checksums: bool = True) -> Iterator[Found]:
    """Each checkpoint in a run's folder, the oldest first; those that a dot hides follow that of their step."""
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder; give a run's folder")
    named = [(int(path.name), path, "") for path in steps(root)]
    hidden = [(match[2], path, HIDDEN[match[1]]) for path, match in _hidden(root) if match[1] in HIDDEN]
    named += [(int(step), path, why) for step, path, why in hidden if STEP_NAME.fullmatch(step)]
    if not named:
        raise CheckpointError(f"{root}: holds no checkpoint; give a run's folder")
    for step, path, why in sorted(named, key=lambda found: (found[0], found[2], found[1].name)):
        wrong = [] if why else [told(error) for error in damages(path, checksums=checksums)]
        status = why or ("damaged" if wrong else "good" if checksums else "complete")
        layout = None if wrong else layout_of(config_of(path))
        yield Found(path.name, step, _bytes(path), _when(path), layout, status, wrong)


def table(found: Iterable[Found]) -> Iterator[str]:
    """A heading, and a line for each checkpoint: columns without blanks in them, then what is wrong."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    wrong = [""]
    for one in found:
        layout = UNKNOWN if one.layout is None else _joined(one.layout)
        rows.append((str(one.step), str(one.bytes), one.when, layout, one.status, one.name))
        wrong.append("; ".join(one.damages))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, more in zip(rows, wrong, strict=True):
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield log.printable("  ".join([*padded, more]).rstrip())


def as_json(what: Iterable[Found] | Mapping[str, Any]) -> str:
    """A survey, or what a checkpoint holds, as JSON text."""
    return json.dumps(what if isinstance(what, Mapping) else [asdict(one) for one in what], indent=1)


def verify(path: Path) -> Iterator[str]:
    """Read a checkpoint, or all of a run, and compare: a line for each damage, or one that says a checkpoint is good.

    Raises CheckpointError at the end if anything is damaged.
    """
    alone = (path / MANIFEST).exists() or STEP_NAME.fullmatch(path.name) is not None
    folders = [path] if alone else sorted(steps(path), key=lambda folder: int(folder.name))
    if not folders or not path.is_dir():
        raise CheckpointError(f"{path}: holds no checkpoint; give the folder of a checkpoint, or of a run")
    bad = 0
    for folder in folders:
        found = list(damages(folder))
        bad += bool(found)
        yield from (log.printable(told(error)) for error in found)
        if not found:
            yield log.printable(f"{folder}: good")
    if bad:
        raise CheckpointError(
            f"{path}: {bad} of {len(folders)} checkpoints damaged; restore from a copy, or use another"
        )


def contents(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, by the folder of its own or of a run; tensor files are not read beyond their headers."""
    checkpoint = find_checkpoint(path)
    state, config = checkpoint.state, config_of(checkpoint.folder)
    train = state.get("train")
    counts = train if isinstance(train, dict) else {}
    found: dict[str, Any] = {
        "checkpoint": str(checkpoint.folder),
        "step": checkpoint.step,
        "samples": counts.get("consumed_samples"),
        "tokens": counts.get("consumed_tokens"),
        "when": _when(checkpoint.folder),
        "bytes": _bytes(checkpoint.folder),
        "versions": state.get("versions"),
        "layout": layout_of(config),
    }
    if config is not None:
        shape = config.model.model_config
        found["parameters"] = shape.parameter_count() if shape.vocab_size > 0 else None
        found["model"] = {"dtype": config.model.dtype, **asdict(shape)}  # pyright: ignore[reportArgumentType]
    found["groups"] = {group: _group(checkpoint, group) for group in checkpoint.groups()}
    found["files"] = {name: facts.size for name, facts in sorted(checkpoint.manifest.files.items())}
    return found


def lines(found: Mapping[str, Any], *, under: str = "") -> Iterator[str]:
    """The same facts, one a line: `key.key: value`."""
    for key, value in found.items():
        if isinstance(value, dict):
            yield from lines(value, under=f"{under}{key}.")
        else:
            text = " ".join(map(str, value)) if isinstance(value, list) else UNKNOWN if value is None else str(value)
            yield log.printable(f"{under}{key}: {text}")


def told(error: CheckpointError) -> str:
    """What is wrong, without the remedy where that is always the same."""
    return error.what if isinstance(error, DamagedError) else str(error)


def _group(checkpoint: Checkpoint, group: str) -> dict[str, Any]:
    """A group's files, tensors and dtypes, by the headers of its files."""
    names: set[str] = set()
    dtypes: set[str] = set()
    files = checkpoint.files_of(group)
    for name in files:
        try:
            entries, _ = header_table(checkpoint.header(name, prove=False)[1])
            dtypes |= {str(entry["dtype"]) for entry in entries.values()}
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"{checkpoint}: {name}: its header cannot be read ({reason(error)})") from error
        names |= {key.partition("@")[0] for key in entries}
    size = sum(checkpoint.manifest.files[name].size for name in files)
    return {"files": len(files), "bytes": size, "tensors": len(names), "dtypes": sorted(dtypes)}


def config_of(folder: Path) -> Config | None:
    """The config that a checkpoint carries; None where it has none that this Pentode reads."""
    try:
        checkpoint = with_manifest(folder)
        checkpoint.prove(CONFIG)
        return load_config(folder / CONFIG)
    except (CheckpointError, ConfigError):
        return None


def layout_of(config: Config | None) -> dict[str, int] | None:
    """The layout that a config asks for, by axis."""
    if config is None:
        return None
    p = config.parallelism
    return {"dp": p.dp, "tp": p.tp, "pp": p.pp, "zero": config.optimizer.zero_stage}


def _joined(layout: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in layout.items())


def _hidden(root: Path) -> Iterator[tuple[Path, Any]]:
    for path in root.glob(".*"):
        match = HIDDEN_NAME.fullmatch(path.name)
        if match and path.is_dir():
            yield path, match


def _bytes(folder: Path) -> int:
    """What a folder's files take, of those that are still there."""
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.lstat().st_size
        except FileNotFoundError:  # a run that saves meanwhile
            continue
    return total


def _when(folder: Path) -> str:
    manifest = folder / MANIFEST
    try:
        written = (manifest if manifest.exists() else folder).lstat().st_mtime
    except FileNotFoundError:  # a run that saves meanwhile
        return UNKNOWN
    return datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
