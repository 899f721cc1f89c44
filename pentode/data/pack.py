"""Documents as one row of tokens in a file, made once and then read in place by every run and rank.

A pack is two files: NAME.bin (little-endian ids, document after document) and NAME.json, written last. Each is made
beside its place and renamed into it: a half-made pack is never seen, and processes that make the same one at once,
which gives the same bytes, do not disturb each other.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pentode.data.files import reason
from pentode.data.windows import token_dtype
from pentode.errors import DataError, StorageError


@dataclass(frozen=True)
class Facts:
    """What a pack holds: `count` tokens up to `largest_id`, of `vocab_size` possible ones; sha256 is of their bytes."""

    count: int
    largest_id: int
    vocab_size: int
    sha256: str


class PackedTokens:
    """A pack opened for reading: `tokens` [count] is mapped from the file, never loaded whole."""

    def __init__(self, path: Path) -> None:
        """OSError, ValueError, TypeError or DataError where there is no whole pack at `path`.bin."""
        self.facts = Facts(**json.loads(path.with_suffix(".json").read_bytes()))
        dtype = file_dtype(self.facts.vocab_size)
        self._file = path.with_suffix(".bin").open("rb")
        self._size = self.facts.count * dtype.itemsize
        self.check()
        if self.facts.count:
            self.tokens = np.memmap(self._file, dtype=dtype, mode="r", shape=(self.facts.count,))
        else:
            self.tokens = np.empty(0, dtype=dtype)  # nothing cannot be mapped

    def check(self) -> None:
        """DataError if the file has been cut short: reading what is gone would kill the process (SIGBUS)."""
        size = os.fstat(self._file.fileno()).st_size
        if size != self._size:
            raise DataError(
                f"{self._file.name}: has {size} bytes now, {self._size} when it was made; start again to remake it"
            )


def file_dtype(vocab_size: int) -> np.dtype:
    """Of the ids in a pack: little-endian on every machine."""
    return np.dtype(token_dtype(vocab_size)).newbyteorder("<")


def write_pack(documents: Iterable[np.ndarray], path: Path, *, vocab_size: int) -> None:
    """Make the pack `path`.bin of `documents`, each an array of ids, in place of one that may be there."""
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = _write_tokens(documents, temporary.with_suffix(".bin"), vocab_size=vocab_size)
        temporary.with_suffix(".json").write_text(json.dumps(asdict(facts)))
        for suffix in (".bin", ".json"):
            temporary.with_suffix(suffix).replace(path.with_suffix(suffix))
    except OSError as error:
        raise StorageError(
            f"{path.parent}: packed tokens cannot be written there: {reason(error)}; make room, or set HF_HOME to "
            "another disk"
        ) from error
    finally:
        for suffix in (".bin", ".json"):
            temporary.with_suffix(suffix).unlink(missing_ok=True)


def _write_tokens(documents: Iterable[np.ndarray], path: Path, *, vocab_size: int) -> Facts:
    dtype = file_dtype(vocab_size)
    digest, count, largest = hashlib.sha256(), 0, 0
    with path.open("wb") as file:
        for document in documents:
            content = document.astype(dtype).tobytes()
            file.write(content)
            digest.update(content)
            count += len(document)
            largest = max(largest, int(document.max(initial=0)))
        file.flush()
        os.fsync(file.fileno())
    return Facts(count=count, largest_id=largest, vocab_size=vocab_size, sha256=digest.hexdigest())
