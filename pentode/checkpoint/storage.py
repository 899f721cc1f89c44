"""The few things that saving does to a file system, each durable when it returns; a refusal becomes a StorageError.

Files and folders get the modes that the umask leaves. All calls go through `os`, so that tests can fail any of them.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pentode.checkpoint.manifest import FileFacts
from pentode.errors import StorageError

PIECE = 16 * 2**20  # bytes hashed and written, or read and hashed, at a time

ELSEWHERE = "point checkpoints.checkpoints_path at another disk"
CAUSES = {
    errno.ENOSPC: ("the disk is full", f"remove files or {ELSEWHERE}"),
    errno.EDQUOT: ("the disk quota is used up", f"remove files or {ELSEWHERE}"),
    errno.EROFS: ("the file system is read-only", ELSEWHERE),
    errno.EIO: ("the disk reports an I/O error", f"check the disk, or {ELSEWHERE}"),
    errno.EACCES: ("writing is not permitted", f"change the folder's permissions, or {ELSEWHERE}"),
}


@contextmanager
def explained(folder: Path, *, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError into a StorageError: where, what, how much space is `needed` and free, and what to do."""
    try:
        yield
    except OSError as error:
        what, remedy = CAUSES.get(error.errno or 0, (error.strerror or str(error), ELSEWHERE))
        need = "" if needed is None else f"{needed:,} bytes are needed, "
        raise StorageError(
            f"{error.filename or folder}: {what} ({need}{_free(folder)} are free); {remedy}; "
            "earlier checkpoints are as they were"
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing."""
    if path.is_dir():
        return
    make_folder(path.parent)
    os.mkdir(path)
    sync_folder(path.parent)


def write(path: Path, pieces: Iterable[bytes | memoryview]) -> FileFacts:
    """Write a new file to the disk, hashing what passes."""
    hasher, size = hashlib.sha256(), 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                block = rest[:PIECE]
                hasher.update(block)
                rest = rest[PIECE:]
                while block:
                    written = os.write(file, block)
                    size += written
                    block = block[written:]
        os.fsync(file)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(file)
    return FileFacts(size, hasher.hexdigest())


def rename(source: Path, target: Path) -> None:
    """Give a file or folder another name in the same folder: after a crash it has one of the two."""
    os.rename(source, target)
    sync_folder(target.parent)


def sync_folder(path: Path) -> None:
    """Bring a folder's list of names to the disk."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(folder)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all in it; links are removed, not followed."""
    if path.is_symlink() or not path.is_dir():
        os.unlink(path)
        return
    for name in sorted(os.listdir(path)):
        remove(path / name)
    os.rmdir(path)


def forget(path: Path) -> None:
    """Have the next reader of a file that was synced read it from the disk, where the kernel can be told so."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def hash_file(path: Path) -> FileFacts:
    """Size and SHA-256 of what a file holds now."""
    hasher, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            hasher.update(piece)
            size += len(piece)
    return FileFacts(size, hasher.hexdigest())


def _free(folder: Path) -> str:
    while not folder.is_dir():
        folder = folder.parent
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"
