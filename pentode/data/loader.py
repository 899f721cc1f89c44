"""Samples to micro-batches: this data rank's share of each global batch, read ahead while the model works.

Of a global batch, rank r of R reads the r-th contiguous part, in micro-batches of equal size.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache

import numpy as np
import torch

from pentode.data.order import sample_ids
from pentode.data.windows import Source
from pentode.errors import DataError
from pentode.parallel.batch import Batch, batch_of, batches_of

WINDOW = 1024  # places of the order that are worked out at once
# Tokens of small steps that a thread reads in one go, and how many steps: to wake it for each costs more than to read.
TOGETHER, MOST_STEPS = 1 << 15, 64

_Step = tuple[int, int]  # samples of the stage consumed before, and the run-wide number of the first sample


class Loader:
    """The training batches of one stage: a pure function of the samples consumed in it, whatever was asked before.

    With `workers`, that many of the following steps, or groups of small ones, are prepared in as many threads; what
    goes wrong there is raised when the step is asked for. With `pin`, batches lie in pinned memory.
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
        self._ready: dict[_Step, list[Batch]] = {}
        self._coming: deque[tuple[_Step, Future[dict[_Step, list[Batch]]]]] = deque()

    def step_batches(self, consumed: int, *, first_number: int) -> list[Batch]:
        """This rank's micro-batches of the step that begins after `consumed` samples of the stage.

        `first_number` is the run-wide number of the step's first sample, which dropout is keyed by.
        """
        step = (consumed, first_number)
        if self._threads is None:
            return self._read(step)[0]
        if step not in self._ready:
            self._receive(step)
        return self._ready.pop(step)

    def close(self) -> None:
        """Wait for the threads and let them go."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _receive(self, step: _Step) -> None:
        """Make `step` ready: from what was prepared, if it comes next there; and have what follows prepared."""
        if self._coming and self._coming[0][0] == step:
            self._ready = self._coming.popleft()[1].result()
        else:
            self._coming.clear()
            self._ready = {}
        if step not in self._ready:
            self._ready[step] = self._read(step)[0]
        tokens = sum(batch.tokens.numel() for batch in self._ready[step])
        together = min(max(1, TOGETHER // tokens), MOST_STEPS)
        while len(self._coming) < self._ahead:
            first, read = self._coming[-1][0] if self._coming else step, together if self._coming else len(self._ready)
            after = self._later(first, read)
            self._coming.append((after, self._threads.submit(self._read_together, after, together)))

    def _later(self, step: _Step, steps: int) -> _Step:
        return step[0] + steps * self._global_batch, step[1] + steps * self._global_batch

    def _read_together(self, first: _Step, count: int) -> dict[_Step, list[Batch]]:
        """`count` steps from `first` on, or up to the first that cannot be read: that is told if it is asked."""
        steps = [self._later(first, k) for k in range(count)]
        with suppress(Exception):
            return dict(zip(steps, self._read(*steps), strict=True))
        found = {}
        with suppress(Exception):
            for step in steps:
                (found[step],) = self._read(step)
        return found

    def _ids(self, first: int, count: int) -> np.ndarray:
        """The samples at `count` places of the order, cut out of windows: a few of them take as long as a window."""
        windows = range(first // WINDOW, (first + count - 1) // WINDOW + 1)
        start = first - windows.start * WINDOW
        return np.concatenate([self._window(number) for number in windows])[start : start + count]

    def _window_ids(self, number: int) -> np.ndarray:
        return sample_ids(number * WINDOW, WINDOW, length=len(self._source), seed=self._seed)

    def _read(self, *steps: _Step) -> list[list[Batch]]:
        """The micro-batches of each step."""
        ids = np.concatenate([self._ids(consumed + self._first, self._share) for consumed, _ in steps])
        rows = torch.from_numpy(checked_samples(self._source, ids, vocab_size=self._vocab_size))
        firsts = torch.tensor([number for _, number in steps])
        numbers = firsts[:, None] + self._first + torch.arange(self._share)
        size = self._micro_batch_size
        batches = batches_of(rows.unflatten(0, (-1, size)), samples=numbers.view(-1, size), pin=self._pin)
        count = self._share // size
        return [batches[i : i + count] for i in range(0, len(batches), count)]


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
        yield batch_of(rows, samples=torch.from_numpy(ids), mask=mask, pin=pin)


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
