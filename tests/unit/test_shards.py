"""A run of a rank's elements, as boxes of the global tensor: the right places, views, nothing twice, no padding."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pentode.dist.mesh import Axis
from pentode.parallel.shards import Block, Piece, blocks_of_range, disjoint, pieces_of_range
from pentode.parallel.spec import Cut, ParamSpec
from tests.helpers.layouts import Parameter, layouts, numbered, parameters

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def of_global(piece: Piece, whole: Tensor) -> Tensor:
    start, values = piece
    return Block(start, tuple(values.shape)).view(whole, start=(0,) * whole.dim())


def shard(spec: ParamSpec, start: int, stop: int) -> Tensor:
    """These elements of the rank's part of a numbered tensor; padding is zero."""
    return spec.take(numbered(spec.global_shape)).flatten()[start:stop].clone()


@given(data=st.data(), shape=SHAPES)
def test_a_range_is_few_blocks_in_order(data: st.DataObject, shape: tuple[int, ...]) -> None:
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, prod(shape))] * 2)))
    found = blocks_of_range(shape, start, stop=stop)
    values = [block.view(numbered(shape), start=(0,) * len(shape)).flatten() for block in found]
    assert [int(x) for block in values for x in block] == list(range(start + 1, stop + 1))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def test_a_range_may_need_as_many_blocks_as_it_may_have() -> None:
    assert blocks_of_range((3, 3, 3), 5, stop=23) == [
        Block((0, 1, 2), (1, 1, 1)),
        Block((0, 2, 0), (1, 1, 3)),
        Block((1, 0, 0), (1, 3, 3)),
        Block((2, 0, 0), (1, 1, 3)),
        Block((2, 1, 0), (1, 1, 2)),
    ]


@given(data=st.data(), parameter=parameters())
def test_each_piece_holds_what_stands_at_its_place(data: st.DataObject, parameter: Parameter) -> None:
    whole = numbered(parameter.shape)
    for spec, start, stop in data.draw(layouts(parameter)):
        flat = shard(spec, start, stop)
        pieces = pieces_of_range(spec, flat, start, owned=False)
        assert all(torch.equal(values, of_global((at, values), whole)) for at, values in pieces)
        held = sorted(x.item() for _, values in pieces for x in values.flatten())
        assert held == sorted(flat[flat > 0].tolist()), "padding is in a piece, or a number is not"


@given(data=st.data(), parameter=parameters())
def test_all_ranks_together_own_each_element_once(data: st.DataObject, parameter: Parameter) -> None:
    counted = torch.zeros(parameter.shape)
    for spec, start, stop in data.draw(layouts(parameter)):
        for piece in pieces_of_range(spec, shard(spec, start, stop), start, owned=True):
            of_global(piece, counted).add_(1)
    assert (counted == 1).all()


@given(data=st.data(), parameter=parameters())
def test_what_is_written_into_a_piece_is_in_the_shard(data: st.DataObject, parameter: Parameter) -> None:
    for spec, start, stop in data.draw(layouts(parameter)):
        flat, there = torch.full((stop - start,), -1.0), shard(spec, start, stop)
        for at, values in pieces_of_range(spec, flat, start, owned=False):
            values.copy_(of_global((at, values), numbered(parameter.shape)))
        assert torch.equal(flat, torch.where(there > 0, there, -1.0)), "padding was touched, or an element was not"


@pytest.mark.parametrize(("rank", "owner"), [(0, True), (1, False), (2, True), (3, False)])
def test_of_copies_the_first_rank_owns_the_element(rank: int, owner: bool) -> None:
    copies = Axis("tp_kv", 2, rank % 2)
    spec = ParamSpec((8 + 2,), Cut(0, Axis("tp", 4, rank), (8, 2), (None, copies)))  # 2 of q, then 1 of a shared k
    whole = numbered((10,))
    pieces = pieces_of_range(spec, spec.take(whole), 0, owned=True)
    expected = [((2 * rank,), 2)] + [((8 + rank // 2,), 1)] * owner
    assert [(at, values.numel()) for at, values in pieces] == expected


def test_a_whole_tensor_is_one_piece_and_nothing_is_none() -> None:
    spec, flat = ParamSpec((2, 3)), torch.ones(6)
    ((at, values),) = pieces_of_range(spec, flat, 0, owned=True)
    assert (at, tuple(values.shape), values.data_ptr()) == ((0, 0), (2, 3), flat.data_ptr())
    assert pieces_of_range(spec, flat[:0], 6, owned=True) == []


@given(data=st.data(), shape=SHAPES)
def test_blocks_are_disjoint_when_no_element_is_in_two(data: st.DataObject, shape: tuple[int, ...]) -> None:
    blocks, counted = [], torch.zeros(shape)
    for _ in range(data.draw(st.integers(0, 4))):
        edges = [sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in shape]
        block = Block(tuple(low for low, _ in edges), tuple(high - low for low, high in edges))
        if prod(block.shape) > 0:
            blocks.append(block)
            block.view(counted, start=(0,) * len(shape)).add_(1)
    assert disjoint(blocks) == bool((counted <= 1).all())
