"""Saving: a checkpoint is made whole in a temporary folder, then renamed into place; a crash leaves the old or the new.

The same content gives the same bytes: nothing but names of temporary folders depends on time or chance. Names that
begin with a dot are on their way in or out:

    .tmp-<step>-<hex>    being written
    .old-<step>-<hex>    about to be replaced by another checkpoint of its step
    .trash-<step>-<hex>  being removed
    .bad-<step>-<hex>    damaged, kept for people to look at
"""

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from pentode import log
from pentode.checkpoint import storage
from pentode.checkpoint.layout import (
    FILE_NAME,
    FORMAT_VERSION,
    MANIFEST,
    STATE,
    FileFacts,
    Manifest,
    Saved,
    entries,
    header,
    json_bytes,
)
from pentode.checkpoint.load import DamagedError, open_checkpoint, steps

PASSING = re.compile(r"\.(tmp|old|trash)-([a-z0-9]+)-[0-9a-f]{8}", re.ASCII)
RUN_FILES = (
    "latest.txt",
    "metrics.jsonl",
    "metrics.*.jsonl.old",
    "report.html",
    "loss.png",
    ".loss.png.tmp",
    "sample.txt",
    "logs/rank-*.log",
    ".bad-*",
    ".metrics.jsonl.tmp",
    ".report.html.tmp",
)


def save(
    root: Path,
    *,
    step: int,
    groups: Mapping[str, Mapping[str, Saved]],
    state: Mapping[str, object],
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write checkpoint `root`/`step` and return its folder; when this returns it survives a crash or a power cut.

    groups  tensors by group ("weights", "optimizer") and name; one safetensors file each
    state   what else decides the next step, as JSON
    files   other files to carry, by name

    A valid checkpoint of that step with the same content is kept as it is; one with other content is replaced, a
    damaged one is set aside. Raises StorageError, after which everything stands as before.
    """
    small = {**(files or {}), STATE: json_bytes({**state, "step": step, "format_version": FORMAT_VERSION})}
    for name in small:
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"save: {name!r} cannot be the name of a file in a checkpoint")
    needed = sum(saved.nbytes for group in groups.values() for saved in group.values())
    needed += sum(map(len, small.values()))
    temporary = root / _passing("tmp", step)
    with storage.explained(root, needed=needed):
        try:
            storage.make_folder(temporary)
            facts = {}
            for group, tensors in sorted(groups.items()):
                name = f"{group}-00000-of-00001.safetensors"
                facts[name] = write_tensors(temporary / name, tensors)
            for name, data in sorted(small.items()):
                facts[name] = storage.write(temporary / name, [data])
            manifest = Manifest(step, facts)
            storage.write(temporary / MANIFEST, [manifest.dump()])
            storage.sync_folder(temporary)
            folder = _publish(root, temporary, manifest)
        except BaseException:
            with suppress(OSError):
                storage.remove(temporary)
            raise
        _name_latest(root, step)
    return folder


def write_tensors(path: Path, group: Mapping[str, Saved]) -> FileFacts:
    """Write a safetensors file of all boxes of `group`, one tensor on the host at a time."""
    head = header([entry for entry, _ in entries(group)])

    def pieces() -> Iterator[bytes | memoryview]:
        yield head
        for _, tensor in entries(group):
            yield _bytes_of(tensor)

    return storage.write(path, pieces())


def clean(root: Path) -> None:
    """Finish what a crash interrupted in a run's folder. For the only process that saves there, before it trains."""
    if not root.is_dir():
        return
    with storage.explained(root):
        for path in sorted(root.iterdir()):
            found = PASSING.fullmatch(path.name)
            if found is None:
                continue
            if found[1] == "old" and not (root / found[2]).exists():
                storage.rename(path, root / found[2])
            else:
                storage.remove(path)


def remove_run(root: Path) -> None:
    """Remove the run that stands in `root`: its checkpoints, records, reports and logs, and no file of anybody else.

    Does nothing where neither a checkpoint nor the records of a run are found.
    """
    checkpoints = [path for path in steps(root) if (path / MANIFEST).is_file() or (path / STATE).is_file()]
    if not checkpoints and not (root / "metrics.jsonl").is_file():
        return
    with storage.explained(root):
        trash = root / _passing("trash", "run")
        storage.make_folder(trash)
        for path in [*checkpoints, *(found for pattern in RUN_FILES for found in sorted(root.glob(pattern)))]:
            storage.rename(path, trash / path.name)
        clean(root)


def _publish(root: Path, temporary: Path, manifest: Manifest) -> Path:
    """Rename the finished temporary folder to its step, or drop it if the same checkpoint is there already."""
    folder = root / str(manifest.step)
    if not folder.exists():
        storage.rename(temporary, folder)
        return folder
    try:
        present = open_checkpoint(folder)
        present.verify()
    except DamagedError as error:
        aside = folder.with_name(_passing("bad", manifest.step))
        log.warning(f"{error.what}; it is replaced and kept as {aside.name}")
    else:
        if present.manifest == manifest:
            storage.remove(temporary)
            return folder
        aside = folder.with_name(_passing("old", manifest.step))
    storage.rename(folder, aside)
    try:
        storage.rename(temporary, folder)
    except OSError:
        with suppress(OSError):
            storage.rename(aside, folder)
        raise
    if aside.name.startswith(".old-"):
        storage.remove(aside)
    return folder


def _name_latest(root: Path, step: int) -> None:
    """Say in latest.txt which checkpoint is the newest; people read it, Pentode does not."""
    temporary = root / _passing("tmp", "latest")
    try:
        storage.write(temporary, [f"{step}\n".encode()])
        storage.rename(temporary, root / "latest.txt")
    except OSError as error:
        log.warning(f"{root / 'latest.txt'}: could not be written ({error}); the checkpoint itself is there")


def _passing(why: str, what: int | str) -> str:
    return f".{why}-{what}-{secrets.token_hex(4)}"


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes in the file's order, without a copy where it is a contiguous one on the host."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
