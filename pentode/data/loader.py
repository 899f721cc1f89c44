"""Samples to micro-batches: this data rank's share of each global batch, read ahead while the model works.

Of a global batch, rank r of R reads the r-th contiguous part, in micro-batches of equal size.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from pentode.data.order import sample_ids
from pentode.data.windows import Source
from pentode.errors import DataError
from pentode.parallel.batch import Batch, batch_of

WINDOW = 1024  # places of the order that are worked out at once


class Loader:
    """The training batches of one stage: a pure function of the samples consumed in it, whatever was asked before.

    With `workers`, that many of the following steps are prepared in as many threads; what goes wrong there is raised
    when the step is asked for. With `pin`, batches lie in pinned memory.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        vocab_size: int,
        micro_batch_size: int,
        micro_batches: int,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        self._source = source
        self._seed = seed
        self._vocab_size = vocab_size
        self._micro_batch_size = micro_batch_size
        self._share = micro_batch_size * micro_batches  # samples that this rank reads in a step
        self._first = rank * self._share
        self._global_batch = ranks * self._share
        self._ahead = workers
        self._pin = pin
        self._threads = ThreadPoolExecutor(workers, "pentode-data") if workers else None
        self._window = lru_cache(maxsize=4)(self._window_ids)
        self._prepared: dict[tuple[int, int], Future[list[Batch]]] = {}

    def step_batches(self, consumed: int, *, first_number: int) -> list[Batch]:
        """This rank's micro-batches of the step that begins after `consumed` samples of the stage.

        `first_number` is the run-wide number of the step's first sample, which dropout is keyed by.
        """
        if self._threads is None:
            return self._read(consumed, first_number)
        prepared = self._prepared.pop((consumed, first_number), None)
        batches = prepared.result() if prepared else self._read(consumed, first_number)
        ahead = [k * self._global_batch for k in range(1, self._ahead + 1)]
        steps = [(consumed + samples, first_number + samples) for samples in ahead]
        self._prepared = {step: self._prepared.get(step) or self._threads.submit(self._read, *step) for step in steps}
        return batches

    def close(self) -> None:
        """Wait for the threads and let them go."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _ids(self, first: int, count: int) -> np.ndarray:
        """The samples at `count` places of the order, cut out of windows: a few of them take as long as a window."""
        windows = range(first // WINDOW, (first + count - 1) // WINDOW + 1)
        start = first - windows.start * WINDOW
        return np.concatenate([self._window(number) for number in windows])[start : start + count]

    def _window_ids(self, number: int) -> np.ndarray:
        return sample_ids(number * WINDOW, WINDOW, length=len(self._source), seed=self._seed)

    def _read(self, consumed: int, first_number: int) -> list[Batch]:
        ids = self._ids(consumed + self._first, self._share)
        rows = torch.from_numpy(checked_samples(self._source, ids, vocab_size=self._vocab_size))
        numbers = first_number + self._first + torch.arange(self._share)
        size = self._micro_batch_size
        parts = zip(rows.split(size), numbers.split(size), strict=True)
        batches = [batch_of(part, samples=samples) for part, samples in parts]
        return [batch.packed(pin=True) for batch in batches] if self._pin else batches


def validation_batches(
    source: Source,
    *,
    vocab_size: int,
    micro_batch_size: int,
    limit: int = 0,
    rank: int = 0,
    ranks: int = 1,
    pin: bool = False,
) -> Iterator[Batch]:
    """This rank's part of the first `limit` micro-batches of `source` (0: all), the same each time and in order.

    Every rank gets equally many, all of one shape, so that ranks stay together and compiled graphs fit: what lies
    beyond the end is there with every label IGNORE.
    """
    size = micro_batch_size
    total = min(len(source), limit * size) if limit else len(source)
    rounds = -(-total // (size * ranks))
    for first in range(rank * rounds * size, (rank + 1) * rounds * size, size):
        ids = np.arange(first, first + size)
        real = ids < total
        rows = torch.from_numpy(checked_samples(source, np.where(real, ids, 0), vocab_size=vocab_size))
        mask = torch.from_numpy(real)[:, None].expand(-1, rows.shape[1] - 1)
        batch = batch_of(rows, samples=torch.from_numpy(ids), mask=mask)
        yield batch.packed(pin=True) if pin else batch


def checked_samples(source: Source, ids: np.ndarray, *, vocab_size: int) -> np.ndarray:
    """The samples `ids` of `source`, int64 [n, S + 1]; DataError for a token that the model does not know."""
    rows = source.samples(ids)
    if rows.min() < 0 or rows.max() >= vocab_size:
        row, place = np.argwhere((rows < 0) | (rows >= vocab_size))[0]
        token = rows[row, place]
        raise DataError(
            f"{source.name}: sample {ids[row]} has token id {token} at place {place}, beyond the model's vocabulary of "
            f"{vocab_size}; set model.model_config.vocab_size to {source.vocab_size}, or use another tokenizer"
        )
    return rows
