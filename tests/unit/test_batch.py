"""A batch's tensors side by side in one buffer: the same numbers, one copy, and never those of another batch."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pentode.parallel.batch import IGNORE, Batch, batch_of, batches_of

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 6))  # sequences, tokens of each
NAMES = ("tokens", "labels", "positions", "samples")
CPU, META = torch.device("cpu"), torch.device("meta")


def a_batch(sizes: tuple[int, int], *, seed: int = 0, masked: bool = False) -> Batch:
    sequences, length = sizes
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(100, (sequences, length + 1), generator=generator)
    mask = torch.rand(sequences, length, generator=generator) < 0.5 if masked else None
    return batch_of(rows, samples=torch.randint(100, (sequences,), generator=generator), mask=mask)


def fields(batch: Batch) -> list[Tensor]:
    return [getattr(batch, name) for name in NAMES]


def copies(batch: Batch) -> list[Tensor]:
    return [field.clone() for field in fields(batch)]


def same(batch: Batch, want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(fields(batch), want, strict=True))


def storages(batch: Batch) -> set[int]:
    return {field.untyped_storage().data_ptr() for field in fields(batch)}


@given(SIZES, st.booleans())
def test_a_packed_batch_is_the_same_in_one_buffer_of_its_own(sizes: tuple[int, int], masked: bool) -> None:
    batch = own(a_batch(sizes, masked=masked))
    assert batch.valid() == len([label for label in batch.labels.tolist() if label != IGNORE])
    before = copies(batch)
    packed = batch.packed()
    assert same(packed, before)
    (storage,) = storages(packed)
    assert storage not in storages(batch)
    buffer = packed.buffer()
    assert buffer.untyped_storage().data_ptr() == storage, "packing made the buffer; asking for it makes none"
    assert torch.equal(buffer, torch.cat(before))
    again = packed.packed()
    assert same(again, before)
    assert storages(again) != {storage}
    assert packed.sequence_length == sizes[1]


@given(SIZES)
def test_a_batch_moves_in_one_copy(sizes: tuple[int, int]) -> None:
    for batch in (own(a_batch(sizes)), a_batch(sizes)):
        assert batch.to(CPU) is batch
        moved = batch.to(META)
        assert [field.shape for field in fields(moved)] == [field.shape for field in fields(batch)]
        assert {field.device for field in fields(moved)} == {META}
        assert moved.tokens._base is not None
        assert len({id(field._base) for field in fields(moved)}) == 1, "one tensor was moved"


@given(SIZES, st.sampled_from(NAMES), st.booleans())
def test_what_is_replaced_is_what_is_copied(sizes: tuple[int, int], name: str, packed: bool) -> None:
    batch = a_batch(sizes) if packed else own(a_batch(sizes))
    new = getattr(batch, name) + 1000
    changed = replace(batch, **{name: new})
    want = [new if name == other else getattr(batch, other) for other in NAMES]
    assert torch.equal(changed.buffer(), torch.cat(want))
    assert same(changed.packed(), want)


VIEWS = {
    "one number again and again": lambda batch: batch.labels[:1].expand_as(batch.labels),
    "the tokens": lambda batch: batch.tokens,
    "the positions": lambda batch: batch.positions,
    "every second number": lambda batch: batch.buffer().as_strided(batch.labels.shape, (2,), 0),
    "from the labels on, every second": lambda batch: batch.buffer().as_strided(
        batch.labels.shape, (2,), batch.labels.storage_offset()
    ),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_labels_that_are_another_view_of_the_buffer_are_copied_as_they_are(view: object) -> None:
    batch = a_batch((2, 5)).packed()
    changed = replace(batch, labels=view(batch))
    want = copies(changed)
    assert torch.equal(changed.buffer(), torch.cat(want))
    assert same(changed.packed(), want)


@given(SIZES, st.integers(0, 3))
def test_a_buffer_may_lie_anywhere_in_its_memory(sizes: tuple[int, int], first: int) -> None:
    packed = a_batch(sizes).packed()
    memory = torch.cat([torch.full((first,), -1), packed.buffer(), torch.full((2,), -1)])
    parts = memory[first:-2].split([field.numel() for field in fields(packed)])
    batch = Batch(*parts)
    assert torch.equal(batch.buffer(), packed.buffer())
    batch.buffer().copy_(a_batch(sizes, seed=1).buffer())
    assert same(batch, copies(a_batch(sizes, seed=1)))
    assert memory[:first].tolist() + memory[-2:].tolist() == [-1] * (first + 2)


@given(SIZES, st.integers(1, 4))
def test_many_micro_batches_are_those_made_one_by_one(sizes: tuple[int, int], count: int) -> None:
    sequences, length = sizes
    rows = torch.randint(100, (count, sequences, length + 1), generator=torch.Generator().manual_seed(0))
    samples = torch.arange(count * sequences).view(count, sequences)
    batches = batches_of(rows, samples=samples)
    assert len({storage for batch in batches for storage in storages(batch)}) == 1
    for batch, own, numbers in zip(batches, rows, samples, strict=True):
        assert same(batch, copies(batch_of(own, samples=numbers)))
        assert torch.equal(batch.tokens.view(sequences, length), own[:, :-1])
        assert torch.equal(batch.labels.view(sequences, length), own[:, 1:])
        assert batch.positions.view(sequences, length).tolist() == [list(range(length))] * sequences
        assert torch.equal(batch.samples, numbers)
        assert torch.equal(batch.buffer(), torch.cat(fields(batch)))


def own(batch: Batch) -> Batch:
    """The batch with a memory for each field."""
    return Batch(*copies(batch))
