"""The order of samples: a permutation each epoch, the same for every layout and resume point."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pentode.data.order import key_of, sample_ids

seeds = st.integers(0, 2**32)


@settings(max_examples=500, deadline=None)
@given(length=st.integers(1, 3000), epoch=st.integers(0, 1000), seed=seeds)
def test_each_epoch_visits_each_sample_once(length: int, epoch: int, seed: int) -> None:
    ids = sample_ids(epoch * length, length, length=length, seed=seed)
    assert ids.dtype == np.int64
    assert np.array_equal(np.sort(ids), np.arange(length))


@settings(max_examples=500, deadline=None)
@given(
    length=st.integers(1, 500), seed=seeds, steps=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 60)), max_size=3)
)
def test_any_cut_into_ranks_batches_and_resumes_reads_the_same_order(
    length: int, seed: int, steps: list[tuple[int, int]]
) -> None:
    consumed, pieces = 0, [np.empty(0, np.int64)]
    for ranks, share in steps:  # ranks, micro-batches and with them the global batch change at every step
        pieces += [sample_ids(consumed + r * share, share, length=length, seed=seed) for r in range(ranks)]
        consumed += ranks * share
    assert np.array_equal(np.concatenate(pieces), sample_ids(0, consumed, length=length, seed=seed))


def test_the_order_is_pinned_on_every_machine_and_version() -> None:
    assert sample_ids(0, 10, length=1000, seed=42).tolist() == [668, 38, 10, 241, 408, 35, 869, 353, 384, 544]
    assert key_of(42) == key_of(42) != key_of("42")


def test_epochs_and_seeds_differ_and_do_not_collide() -> None:
    orders = {tuple(sample_ids(e * 50, 50, length=50, seed=s)) for e in range(20) for s in range(20)}
    assert len(orders) == 400  # seed + epoch as a key would give 39


@pytest.mark.parametrize("length", [10, 24, 50, 300])
def test_places_are_visited_evenly(length: int) -> None:
    """Chi-squared over 2000 epochs of where the first place goes, and how far the second is from it."""
    epochs = 2000
    ids = sample_ids(0, epochs * length, length=length, seed=7).reshape(epochs, length)
    for values, bins in [(ids[:, 0], length), ((ids[:, 1] - ids[:, 0]) % length - 1, length - 1)]:
        expected = epochs / bins
        chi_squared = ((np.bincount(values, minlength=bins) - expected) ** 2 / expected).sum()
        assert abs(chi_squared - (bins - 1)) < 5 * (2 * (bins - 1)) ** 0.5  # five standard deviations


def test_a_very_long_order_needs_no_memory() -> None:
    ids = sample_ids(10**15, 1000, length=2**40 + 1, seed=0)
    assert len(np.unique(ids)) == 1000
    assert ids.min() >= 0
    assert ids.max() <= 2**40
