"""Checkpoints that all ranks prove and open together: each file is read by one of them, and all hear what it found.

A thousand ranks that each read everything would read a checkpoint a thousand times from the disk that they share, and
open a million files for the headers alone.
Every rank must call these, and what one of them raises all raise. What the first rank sees decides: a checkpoint in
which others alone find fault is no damaged one, but in a folder that they see otherwise, or on a broken machine.
"""

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pentode.checkpoint import storage
from pentode.checkpoint.folder import (
    Checkpoint,
    DamagedError,
    Header,
    first_whole,
    set_aside,
    steps,
    tell_damages,
    with_manifest,
)
from pentode.checkpoint.manifest import MANIFEST, FileFacts
from pentode.dist.collectives import gather_objects
from pentode.dist.mesh import Axis
from pentode.dist.together import on_first, on_first_at_length, together, together_at_length
from pentode.errors import CheckpointError, on_all_ranks

T = TypeVar("T")
REMEDY = "checkpoints must be in a folder that all ranks see"


def find_together(path: Path, world: Axis) -> Checkpoint | None:
    """The checkpoint that a user means by a folder: its own, or a run's, whose newest whole one it is; None if none."""
    is_one = gather_objects(together((path / MANIFEST).exists, world), world)[0]
    return open_together(path, world) if is_one else newest_together(path, world)


def newest_together(root: Path, world: Axis, *, quarantine: bool = False, fallback: bool = True) -> Checkpoint | None:
    """`folder.newest`; the first rank alone tells of damaged ones and, with `quarantine`, sets them aside."""
    folders = _seen_by_all(root, world)
    try:
        found, damaged = first_whole(folders, lambda folder: open_together(folder, world), fallback=fallback)
    except CheckpointError as error:
        on_all_ranks(error)
        raise

    def tidy() -> None:
        if found is not None:
            tell_damages(damaged, found)
            if quarantine:
                set_aside(damaged)

    on_first(tidy, world)
    return found


def open_together(folder: Path, world: Axis) -> Checkpoint:
    """Open one checkpoint by its folder, its every file proven right; raises CheckpointError."""
    checkpoint = _first_decides(lambda: with_manifest(folder), world)
    first, *others = gather_objects(checkpoint.manifest.digest(), world)
    for rank, other in enumerate(others, 1):
        if other != first:
            raise on_all_ranks(CheckpointError(f"{folder / MANIFEST}: rank {rank} reads another than rank 0; {REMEDY}"))
    _prove(checkpoint, world)
    _first_decides(checkpoint.read_state, world)
    return checkpoint


def hear_headers(checkpoint: Checkpoint, groups: Sequence[str], world: Axis) -> None:
    """Have the headers of these groups' tensor files on every rank, each file opened by one; raises CheckpointError."""
    files = together(lambda: {name for group in groups for name in checkpoint.files_of(group)}, world)
    found = _each_on_one_rank(checkpoint, files, lambda name: Header.pack(*checkpoint.header(name)), world)
    checkpoint.proven.update(files)
    checkpoint.heard.update(found)


def shares(files: Mapping[str, FileFacts], ranks: int) -> list[list[str]]:
    """Which files each rank reads: each is one rank's, and all read about as many bytes."""
    found: list[list[str]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for name in sorted(files, key=lambda name: (-files[name].size, name)):
        load, rank = loads[0]
        found[rank].append(name)
        heapq.heapreplace(loads, (load + files[name].size, rank))
    return found


def _seen_by_all(root: Path, world: Axis) -> list[Path]:
    """The folders of a run's checkpoints, the newest first; CheckpointError where ranks do not see the same newest."""

    def seen() -> list[str]:
        with storage.explained(root):
            return [path.name for path in steps(root)]

    first, *others = gather_objects(together(seen, world), world)
    for rank, other in enumerate(others, 1):
        if other[:1] != first[:1]:
            raise on_all_ranks(
                CheckpointError(
                    f"{root}: rank 0 found {_in_words(first)} to go on from, rank {rank} {_in_words(other)}; {REMEDY}"
                )
            )
    return [root / name for name in first]


def _in_words(names: Sequence[str]) -> str:
    return f"step {names[0]}" if names else "no checkpoint"


def _prove(checkpoint: Checkpoint, world: Axis) -> None:
    """Compare every file with the manifest, each on one rank."""
    files = checkpoint.manifest.files
    _each_on_one_rank(checkpoint, files, checkpoint.prove, world)
    checkpoint.proven.update(files)


def _each_on_one_rank(
    checkpoint: Checkpoint, names: Collection[str], work: Callable[[str], T], world: Axis
) -> dict[str, T]:
    """What the work gives for each of these files, on the rank that reads it; all raise what damage it found."""
    own = [name for name in shares(checkpoint.manifest.files, world.size)[world.rank] if name in names]
    found = gather_objects(together_at_length(lambda: _until_damaged(work, own), world), world)
    for rank, (_, damage) in enumerate(found):
        if damage is None:
            continue
        name, error = damage
        if rank > 0:
            on_first_at_length(lambda name=name: work(name), world)
            raise _seen_otherwise(error, rank)
        raise on_all_ranks(error)
    return {name: result for results, _ in found for name, result in results.items()}


def _until_damaged(
    work: Callable[[str], T], names: Sequence[str]
) -> tuple[dict[str, T], tuple[str, DamagedError] | None]:
    """What the work gives for these files, and the first in which it finds damage."""
    results: dict[str, T] = {}
    for name in names:
        try:
            results[name] = work(name)
        except DamagedError as error:
            return {}, (name, error)
    return results, None


def _first_decides(work: Callable[[], T], world: Axis) -> T:
    """Do it on every rank; what it gave here, unless the first one found damage, or others alone."""

    def tried() -> tuple[T, None] | tuple[None, DamagedError]:
        try:
            return work(), None
        except DamagedError as error:
            return None, error

    result, damage = together(tried, world)
    for rank, error in enumerate(gather_objects(damage, world)):
        if error is not None:
            raise on_all_ranks(error) if rank == 0 else _seen_otherwise(error, rank)
    return result


def _seen_otherwise(error: DamagedError, rank: int) -> CheckpointError:
    """What all ranks raise where this rank found damage, and the first one, who looked too, none."""
    return on_all_ranks(CheckpointError(f"rank {rank}: {error.what}, where rank 0 finds no fault; {REMEDY}"))
