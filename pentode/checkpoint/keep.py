"""Which checkpoints of a run stay, and the removal of the others: never before a newer one was read and found right."""

import secrets
from collections.abc import Collection, Sequence
from pathlib import Path

from pentode import log
from pentode.checkpoint import storage
from pentode.checkpoint.folder import DamagedError, damages, open_checkpoint, steps
from pentode.errors import CheckpointError


def to_remove(complete: Sequence[int], *, keep_last: int, keep_every: int | None) -> list[int]:
    """Of the steps whose checkpoints are complete, those to remove: not the newest, nor what `keep_every` divides."""
    old = sorted(complete, reverse=True)[keep_last:]
    return [step for step in old if keep_every is None or step % keep_every]


def prune(root: Path, newest: int, *, keep_last: int, keep_every: int | None, spared: Collection[int] = ()) -> None:
    """Read checkpoint `newest` from the disk again, and if it is right remove those that need not stay.

    Folders that are no complete checkpoint are neither counted nor touched; `spared` ones stay. Each that goes is
    renamed first, so that a crash leaves nothing half-removed under its name. Raises StorageError; does nothing but
    warn if `newest` is damaged.
    """
    with storage.explained(root):
        try:
            checkpoint = open_checkpoint(root / str(newest))
            for name in checkpoint.manifest.files:
                storage.forget(checkpoint.folder / name)
            checkpoint.verify()
        except DamagedError as error:
            log.warning(f"{error.what}; no older checkpoint is removed")
            return
        older = [folder for folder in steps(root) if int(folder.name) < newest]
        complete = [newest, *(int(folder.name) for folder in older if _is_complete(folder))]
        for step in to_remove(complete, keep_last=keep_last, keep_every=keep_every):
            if step in spared:
                continue
            trash = root / f".trash-{step}-{secrets.token_hex(4)}"
            storage.rename(root / str(step), trash)
            storage.remove(trash)


def _is_complete(folder: Path) -> bool:
    """Whether a checkpoint has all its files, by the manifest's sizes."""
    try:
        return not list(damages(folder, checksums=False))
    except CheckpointError:
        return False
