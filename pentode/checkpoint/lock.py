"""One process at a time trains in a folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pentode.checkpoint import storage
from pentode.errors import StorageError

NAME = ".lock"


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold a run's folder, which is made if need be; StorageError where another process holds it.

    The lock ends with the process, however that ends; the file stays.
    """
    with storage.explained(root):
        root.mkdir(parents=True, exist_ok=True)
        file = (root / NAME).open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"{root}: another process trains here; stop it, or use another checkpoints.checkpoints_path"
            ) from error
        yield
