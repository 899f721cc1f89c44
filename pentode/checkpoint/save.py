"""Saving: a checkpoint is made whole in a temporary folder, then renamed into place; a crash leaves the old or the new.

All ranks save together, each the boxes that it owns, into files of its own; the folder is on a disk that all of them
see. The same content gives the same bytes: nothing but names of temporary folders depends on time or chance. Names
that begin with a dot are on their way in or out:

    .tmp-<step>-<hex>    being written
    .old-<step>-<hex>    about to be replaced by another checkpoint of its step
    .trash-<step>-<hex>  being removed
    .bad-<step>-<hex>    damaged, kept for people to look at
"""

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from pentode import log
from pentode.checkpoint import storage
from pentode.checkpoint.folder import DamagedError, open_checkpoint, steps
from pentode.checkpoint.layout import Saved, entries, header
from pentode.checkpoint.manifest import (
    FILE_NAME,
    FORMAT_VERSION,
    HIDDEN_NAME,
    MANIFEST,
    STATE,
    FileFacts,
    Manifest,
    json_bytes,
)
from pentode.dist.board import Cancelled
from pentode.dist.collectives import gather_objects
from pentode.dist.mesh import Axis
from pentode.dist.together import together

ALONE = Axis("world")
Read = Callable[[str], Iterator[memoryview]]
_Plan = tuple[dict[str, bool], int, str]  # has something of each group; bytes to write; a temporary folder

MANIFEST_LINE = 160  # bytes that the manifest has about a file, roughly

RUN_FILES = (
    "latest.txt",
    "metrics.jsonl",
    "metrics.*.jsonl.old",
    "report.html",
    "loss.png",
    ".loss.png.tmp",
    "sample.txt",
    "logs/rank-*.log",
    "from-s3",
    "hf/[0-9]*",
    "hf/.tmp-*",
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
    world: Axis = ALONE,
    read: Read | None = None,
    cancelled: threading.Event | None = None,
) -> Path:
    """Write checkpoint `root`/`step` and return its folder; when this returns it survives a crash or a power cut.

    groups     tensors by group ("weights", "optimizer") and name, of each what this rank writes; every rank that has
               something of a group writes one safetensors file of it
    state      what else decides the next step, as JSON; rank 0's is written
    files      other files to carry, by name; rank 0's are written
    world      the ranks that save together; all must call, and none returns before the checkpoint is there
    read       gives the bytes of a group's tensors in file order, group after group by name; without it, they do
    cancelled  if it is set on rank 0 before the checkpoint gets its name, the save ends with Cancelled

    A valid checkpoint of that step with the same content is kept as it is; one with other content is replaced, a
    damaged one is set aside. Raises StorageError, on all ranks if on one, after which everything stands as before.
    """
    first = world.rank == 0
    small: dict[str, bytes] = {}

    def plan() -> _Plan:
        if first:
            small.update(_small_files(step, state, files or {}))
        needed = sum(saved.nbytes for group in groups.values() for saved in group.values())
        held = {group: any(saved.pieces for saved in tensors.values()) for group, tensors in groups.items()}
        return held, needed + sum(map(len, small.values())), _passing("tmp", step)

    plans = gather_objects(together(plan, world), world)
    temporary = root / plans[0][2]
    explained = storage.explained(root, needed=sum(needed for _, needed, _ in plans))

    @explained
    def begin() -> None:
        if first:
            storage.make_folder(temporary)

    @explained
    def write() -> dict[str, tuple[int, str]]:
        found = {}
        for group, name in file_names([held for held, _, _ in plans], world.rank).items():
            tensors = groups.get(group, {})
            found[name] = write_tensors(temporary / name, tensors, data=None if read is None else read(group))
        for name, data in sorted(small.items()):
            found[name] = storage.write(temporary / name, [data])
        return {name: (facts.size, facts.sha256) for name, facts in found.items()}

    @explained
    def finish() -> None:
        if first:
            facts = {name: FileFacts(*known) for of_rank in written for name, known in of_rank.items()}
            _publish(root, temporary, Manifest(step, facts), cancelled or threading.Event())

    try:
        together(begin, world)
        written = gather_objects(together(write, world), world)
        together(finish, world)
    except BaseException:
        if first:
            with suppress(OSError):
                storage.remove(temporary)
        raise
    if first:
        _name_latest(root, step)
    return root / str(step)


def file_names(held: Sequence[Mapping[str, bool]], rank: int) -> dict[str, str]:
    """A rank's file of each group of which it has something, by each rank's groups; what nobody has is rank 0's."""
    found = {}
    for group in sorted({group for groups in held for group in groups}):
        writers = [writer for writer, groups in enumerate(held) if groups.get(group)] or [0]
        if rank in writers:
            found[group] = f"{group}-{writers.index(rank):05}-of-{len(writers):05}.safetensors"
    return found


def write_tensors(
    path: Path,
    group: Mapping[str, Saved],
    *,
    data: Iterator[memoryview] | None = None,
) -> FileFacts:
    """Write a safetensors file of all boxes of `group`, one tensor on the host at a time; see `layout.header`.

    data  their bytes, in the order of `layout.entries`, where they are not to be read from the tensors
    """
    head = header([entry for entry, _ in entries(group)])
    return storage.write(path, chain([head], (_bytes_of(t) for _, t in entries(group)) if data is None else data))


def size_of(groups: Mapping[str, Mapping[str, Saved]], files: Mapping[str, bytes]) -> int:
    """Bytes that this rank's files of these groups take, and the given ones; the manifest's line of each is counted."""
    total = sum(MANIFEST_LINE + len(data) for data in files.values())
    for group in groups.values():
        found = [entry for entry, _ in entries(group)]
        if found:
            total += MANIFEST_LINE + len(header(found)) + sum(entry.end - entry.begin for entry in found)
    return total


def clean(root: Path) -> None:
    """Finish what a crash interrupted in a run's folder. For the only process that saves there, before it trains."""
    if not root.is_dir():
        return
    with storage.explained(root):
        for path in sorted(root.iterdir()):
            found = HIDDEN_NAME.fullmatch(path.name)
            if found is None or found[1] == "bad":
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
            storage.rename(path, trash / "-".join(path.relative_to(root).parts))
        clean(root)


def _small_files(step: int, state: Mapping[str, object], files: Mapping[str, bytes]) -> dict[str, bytes]:
    """What a checkpoint holds beside tensors and the manifest."""
    small = {**files, STATE: json_bytes({**state, "step": step, "format_version": FORMAT_VERSION})}
    for name in small:
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"save: {name!r} cannot be the name of a file in a checkpoint")
    return small


def _publish(root: Path, temporary: Path, manifest: Manifest, cancelled: threading.Event) -> None:
    """Complete the temporary folder and rename it to its step, or drop it if the same checkpoint is there already."""
    storage.write(temporary / MANIFEST, [manifest.dump()])
    storage.sync_folder(temporary)
    folder = root / str(manifest.step)
    if not folder.exists():
        _rename_unless(cancelled, temporary, folder)
        return
    try:
        present = open_checkpoint(folder)
        present.verify()
    except DamagedError as error:
        aside = folder.with_name(_passing("bad", manifest.step))
        log.warning(f"{error.what}; it is replaced and kept as {aside.name}")
    else:
        if present.manifest == manifest:
            storage.remove(temporary)
            return
        aside = folder.with_name(_passing("old", manifest.step))
    _rename_unless(cancelled, folder, aside)
    try:
        storage.rename(temporary, folder)
    except OSError:
        with suppress(OSError):
            storage.rename(aside, folder)
        raise
    if aside.name.startswith(".old-"):
        storage.remove(aside)


def _rename_unless(cancelled: threading.Event, source: Path, target: Path) -> None:
    """Rename what is to be published or to make room for it; a disk may have taken so long that nobody wants that."""
    if cancelled.is_set():
        raise Cancelled
    storage.rename(source, target)


def _name_latest(root: Path, step: int) -> None:
    """Say in latest.txt which checkpoint is the newest; people read it, Pentode does not."""
    temporary = root / _passing("tmp", "latest")
    try:
        storage.write(temporary, [f"{step}\n".encode()])
        storage.rename(temporary, root / "latest.txt")
    except OSError as error:
        with suppress(OSError):
            storage.remove(temporary)
        log.warning(f"{root / 'latest.txt'}: could not be written ({error}); the checkpoint itself is there")


def _passing(why: str, what: int | str) -> str:
    return f".{why}-{what}-{secrets.token_hex(4)}"


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes in the file's order, without a copy where it is a contiguous one on the host."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
