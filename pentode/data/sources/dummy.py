"""Random tokens without end, for trying out speed and memory: sample i depends on (seed, i) alone."""

import numpy as np

from pentode.data.order import GOLDEN, key_of, mix
from pentode.data.windows import fingerprint_of

SAMPLES = 1 << 40  # more than any run reads


class DummySource:
    """Every token is drawn evenly from the vocabulary."""

    name = "dummy data"

    def __init__(self, *, vocab_size: int, sequence_length: int, seed: int) -> None:
        self.vocab_size = vocab_size
        self.largest_id = vocab_size - 1
        self.fingerprint = fingerprint_of("dummy", vocab_size, seed)
        self._seed = np.uint64(key_of("dummy", seed))
        self._places = np.arange(sequence_length + 1, dtype=np.uint64)

    def __len__(self) -> int:
        return SAMPLES

    def samples(self, ids: np.ndarray) -> np.ndarray:
        """The samples numbered `ids` [n], int64 [n, sequence_length + 1]."""
        rows = mix(ids.astype(np.uint64) * np.uint64(GOLDEN) ^ self._seed)[:, None]
        return (mix(rows + self._places) % np.uint64(self.vocab_size)).astype(np.int64)
