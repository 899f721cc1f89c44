"""Batches are a pure function of samples consumed, whatever the layout, the workers or the history."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pentode.data import loader as loaders
from pentode.data.loader import Loader, validation_batches
from pentode.data.order import sample_ids
from pentode.data.windows import Windows
from pentode.errors import DataError
from pentode.parallel.batch import IGNORE, Batch

LENGTH = 6


class Numbered:
    """Sample i is i, i + 1, ..., so that a batch shows which samples it holds; sample `bad` has a token too many."""

    name = "numbered"
    vocab_size = 1 << 20
    largest_id = vocab_size - 1
    fingerprint = ""

    def __init__(self, n: int, *, bad: int = -1) -> None:
        self.n, self.bad, self.threads = n, bad, []

    def __len__(self) -> int:
        return self.n

    def samples(self, ids: np.ndarray) -> np.ndarray:
        self.threads.append(threading.current_thread().name)
        rows = ids[:, None] + np.arange(LENGTH + 1)
        rows[ids == self.bad, 2] = self.vocab_size
        return rows


def loader(source: object, **changes: int) -> Loader:
    options = {"seed": 5, "vocab_size": Numbered.vocab_size, "micro_batch_size": 2, "micro_batches": 3} | changes
    return Loader(source, **options)


def first_tokens(batches: list[Batch] | Iterator[Batch]) -> list[int]:
    return [int(token) for batch in batches for token in batch.tokens.view(-1, LENGTH)[:, 0]]


def numbers(batches: list[Batch]) -> list[int]:
    return [int(number) for batch in batches for number in batch.samples]


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 300),
    seed=st.integers(0, 1000),
    legs=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 2)), max_size=3),
)
def test_any_history_of_layouts_reads_one_ranks_order(n: int, seed: int, legs: list[tuple[int, int, int, int]]) -> None:
    consumed, read, seen = 0, [], []
    for ranks, micro_batch_size, micro_batches, steps in legs:  # a leg: the run is resumed in another layout
        shape = {"seed": seed, "micro_batch_size": micro_batch_size, "micro_batches": micro_batches, "ranks": ranks}
        loaders = [loader(Numbered(n), **shape, rank=rank) for rank in range(ranks)]
        for _ in range(steps):
            for one in loaders:
                batches = one.step_batches(consumed, first_number=consumed + 7)
                assert [batch.samples.numel() for batch in batches] == [micro_batch_size] * micro_batches
                read += first_tokens(batches)
                seen += numbers(batches)
            consumed += ranks * micro_batch_size * micro_batches
    assert read == sample_ids(0, consumed, length=n, seed=seed).tolist()
    assert seen == list(range(7, consumed + 7))


@given(
    window=st.integers(1, 7),
    n=st.integers(1, 40),
    asked=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 50)), min_size=1, max_size=6),
)
def test_windows_of_the_order_are_the_order(window: int, n: int, asked: list[tuple[int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders, "WINDOW", window)
        one = loader(Numbered(n))
        for first, count in asked:  # of one loader, which keeps a few windows
            assert one._ids(first, count).tolist() == sample_ids(first, count, length=n, seed=5).tolist()


def test_a_window_of_the_order_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(first: int, count: int, *, length: int, seed: int) -> np.ndarray:
        asked.append(first)
        return sample_ids(first, count, length=length, seed=seed)

    monkeypatch.setattr(loaders, "sample_ids", counted)
    monkeypatch.setattr(loaders, "WINDOW", 12)
    one = loader(Numbered(50))
    for step in range(6):
        one.step_batches(6 * step, first_number=6 * step)
    assert asked == [0, 12, 24]


def test_labels_are_the_next_tokens() -> None:
    for batch in loader(Numbered(50)).step_batches(0, first_number=0):
        assert torch.equal(batch.labels, batch.tokens + 1)
        assert torch.equal(batch.positions, torch.arange(LENGTH).repeat(2))
        assert batch.tokens.dtype == batch.labels.dtype == batch.samples.dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_steps_may_be_asked_for_in_any_order(workers: int) -> None:
    plain, ahead = loader(Numbered(100)), loader(Numbered(100), workers=workers)
    for step in [0, 1, 2, 5, 3, 3, 4, 0, 7]:
        one, two = (who.step_batches(step * 6, first_number=step * 6) for who in (plain, ahead))
        assert first_tokens(one) == first_tokens(two)
        assert numbers(one) == numbers(two)
    ahead.close()


def test_small_steps_are_prepared_together_and_a_bad_one_is_told_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loaders, "TOGETHER", 4 * 6 * LENGTH)  # four steps
    order = sample_ids(0, 60, length=100, seed=5)
    source = Numbered(100, bad=int(order[6 * 6]))  # of step 6, the second of the second group
    ahead, plain = loader(source, workers=1), loader(Numbered(100))
    for step in range(6):
        got, want = (who.step_batches(step * 6, first_number=step * 6) for who in (ahead, plain))
        assert first_tokens(got) == first_tokens(want)
    with pytest.raises(DataError, match=f"sample {order[36]} has token id"):
        ahead.step_batches(36, first_number=36)
    ahead.close()
    assert source.threads.count("MainThread") == 2  # the first step, and the bad one when it was asked for


def test_the_number_of_the_first_sample_is_part_of_what_is_prepared() -> None:
    ahead = loader(Numbered(100), workers=1)
    ahead.step_batches(0, first_number=0)
    assert numbers(ahead.step_batches(6, first_number=100)) == list(range(100, 106))
    ahead.close()


def test_the_following_steps_are_prepared_in_threads_which_close_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "TOGETHER", 1)
    source = Numbered(100)
    ahead = loader(source, workers=2)
    for step in range(4):
        ahead.step_batches(step * 6, first_number=0 + step * 6)
    ahead.close()
    assert source.threads.count("MainThread") == 1
    assert 3 <= len(source.threads) - 1 <= 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pentode-data")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_token_beyond_the_vocabulary_is_found_before_it_is_used(workers: int) -> None:
    bad = int(sample_ids(6, 6, length=40, seed=5)[4])  # in the second step
    one = loader(Numbered(40, bad=bad), workers=workers)
    one.step_batches(0, first_number=0)
    message = rf"numbered: sample {bad} has token id 1048576 at place 2, beyond the model's vocabulary of 1048576"
    with pytest.raises(DataError, match=message):
        one.step_batches(6, first_number=6)
    one.close()


@pytest.mark.parametrize("place", [(0, 0), (2, 3), (4, LENGTH)])
@pytest.mark.parametrize("token", [256, 257, 65535, 2**31, -1])
def test_a_bad_token_anywhere_is_found(place: tuple[int, int], token: int) -> None:
    rows = np.zeros((5, LENGTH + 1), dtype=np.int64)
    rows[place] = token
    source = Windows(rows.flatten(), name="w", sequence_length=LENGTH, stride=LENGTH + 1, **PLAIN)
    with pytest.raises(DataError, match=rf"sample {place[0]} has token id {token} at place {place[1]}"):
        list(validation_batches(source, vocab_size=256, micro_batch_size=5))


PLAIN = {"vocab_size": 256, "largest_id": 255, "fingerprint": ""}


@given(n=st.integers(1, 40), size=st.integers(1, 5), limit=st.integers(0, 6), ranks=st.integers(1, 5))
def test_validation_reads_the_same_samples_once_on_any_number_of_ranks(
    n: int, size: int, limit: int, ranks: int
) -> None:
    shape = {"vocab_size": 1 << 20, "micro_batch_size": size, "limit": limit, "ranks": ranks}
    every = [list(validation_batches(Numbered(n), **shape, rank=rank)) for rank in range(ranks)]
    assert len({len(batches) for batches in every}) == 1
    batches = [batch for part in every for batch in part]
    assert {batch.tokens.numel() for batch in batches} == {size * LENGTH}
    real = [batch.labels.view(-1, LENGTH)[:, 0] - 1 for batch in batches]
    expected = list(range(min(n, limit * size) if limit else n))
    assert [int(token) for tokens in real for token in tokens if token != IGNORE - 1] == expected
    assert sum(int(batch.valid()) for batch in batches) == len(expected) * LENGTH
