"""Reading what users name: whatever is wrong with a file becomes one DataError line."""

import os
from pathlib import Path

from pentode.errors import DataError


def read_bytes(path: Path) -> bytes:
    """The file's content; DataError where it is missing, unreadable, a folder or a loop of links."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}; name a readable file") from error


def reason(error: BaseException) -> str:
    """What went wrong, in one line: the operating system's words where there are any."""
    text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return next((line.strip().rstrip(".") for line in text.splitlines() if line.strip()), type(error).__name__)
