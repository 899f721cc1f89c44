"""Samples cut from one long row of tokens, and the interface that every source of samples has."""

import hashlib
from collections.abc import Callable
from typing import Protocol

import numpy as np

from pentode.errors import DataError


class Source(Protocol):
    """A numbered set of samples: rows of sequence_length + 1 token ids.

    name         what errors call it
    vocab_size   ids are below it
    largest_id   that occurs; the model's vocabulary must hold it
    fingerprint  a hash of the content, the same on every machine; other data has another one
    """

    name: str
    vocab_size: int
    largest_id: int
    fingerprint: str

    def __len__(self) -> int: ...

    def samples(self, ids: np.ndarray) -> np.ndarray:
        """The samples numbered `ids` [n], int64 [n, sequence_length + 1]."""
        ...


class Windows:
    """Sample i is tokens[i * stride : i * stride + sequence_length + 1].

    A stride of 1 gives every window there is. A stride of sequence_length gives windows that share one token, so that
    each token but the first is predicted exactly once; the leftover at the end is dropped.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        name: str,
        sequence_length: int,
        stride: int,
        vocab_size: int,
        largest_id: int,
        fingerprint: str,
        check: Callable[[], None] | None = None,
    ) -> None:
        needed = sequence_length + 1
        if len(tokens) < needed:
            raise DataError(
                f"{name}: has {len(tokens)} tokens, needs {needed} for one sample of sequence_length "
                f"{sequence_length}; use more text or shorter sequences"
            )
        self.name = name
        self.vocab_size = vocab_size
        self.largest_id = largest_id
        self.fingerprint = fingerprint
        self._rows = np.lib.stride_tricks.sliding_window_view(tokens, needed)[::stride]  # [len(self), S + 1], a view
        self._check = check  # called before the tokens are touched

    def __len__(self) -> int:
        return len(self._rows)

    def samples(self, ids: np.ndarray) -> np.ndarray:
        """The samples numbered `ids` [n], int64 [n, sequence_length + 1]."""
        if self._check is not None:
            self._check()
        return self._rows[ids].astype(np.int64)


def split(tokens: np.ndarray, *, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Training tokens and the contiguous last part that is held out for validation."""
    held_out = round(len(tokens) * validation_fraction)
    return tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :]


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type that holds every id below `vocab_size`."""
    return next(kind for kind in (np.uint8, np.uint16, np.uint32) if vocab_size <= np.iinfo(kind).max + 1)


def fingerprint_of(*parts: str | int | float | bytes) -> str:
    """One hash for all `parts`, in hexadecimal digits."""
    return hashlib.sha256(b"\0".join(p if isinstance(p, bytes) else str(p).encode() for p in parts)).hexdigest()
