"""ParamSpec: each element of the global tensor has its place on exactly one rank of the cut, padding on none."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pentode.dist.mesh import Axis
from pentode.parallel.spec import Cut, ParamSpec, parameter, specs_of


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ParamSpec, ...]:
    """One parameter's specs on all ranks of its axis."""
    size = draw(st.sampled_from((1, 2, 3, 4)))
    pieces = tuple(size * n for n in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    padding = draw(st.integers(0, pieces[-1] - 1)) if len(pieces) == 1 else 0
    dim = draw(st.integers(0, 1))
    shape = [draw(st.integers(1, 4)), draw(st.integers(1, 4))]
    shape[dim] = sum(pieces) - padding
    cut = Cut(dim, Axis("tp", size), pieces)
    ranks = (dataclasses.replace(cut, axis=Axis("tp", size, rank)) for rank in range(size))
    return tuple(ParamSpec(tuple(shape), cut) for cut in ranks)


@given(layouts())
def test_the_ranks_parts_make_up_the_whole_once(specs: tuple[ParamSpec, ...]) -> None:
    shape = specs[0].global_shape
    whole = torch.arange(1, 1 + shape[0] * shape[1]).view(shape)
    again, counted = torch.zeros_like(whole), torch.zeros_like(whole)
    for spec in specs:
        part = spec.take(whole)
        assert tuple(part.shape) == spec.local_shape
        spec.put(part, into=again)
        for box in spec.boxes():
            box.of_global(counted).add_(1)
        held = sum(box.shape[0] * box.shape[1] for box in spec.boxes())
        assert (part != 0).sum() == held, "padding is not zero"
    assert torch.equal(again, whole)
    assert (counted == 1).all()


def test_fused_pieces_are_cut_one_by_one() -> None:
    spec = ParamSpec((8, 1), Cut(0, Axis("tp", 2, 1), (4, 2, 2)))
    assert spec.take(torch.arange(8)[:, None]).flatten().tolist() == [2, 3, 5, 7]


def test_a_rank_may_hold_only_padding() -> None:
    spec = ParamSpec((3, 2), Cut(0, Axis("tp", 2, 1), (8,)))
    assert spec.boxes() == []
    assert spec.local_shape == (4, 2)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="tp=4 does not divide a piece of 6"):
        Cut(0, Axis("tp", 4), (8, 6))
    with pytest.raises(ValueError, match=r"a tensor of \[2, 2\] for a global \[3, 2\]"):
        ParamSpec((3, 2)).take(torch.ones(2, 2))


def test_a_piece_with_copies_need_only_be_cut_into_their_parts() -> None:
    cut = Cut(0, Axis("tp", 4), (8, 6), (None, Axis("tp_kv", 2)))
    assert cut.local_size() == 8 // 4 + 6 // 2


def test_a_parameter_carries_its_spec() -> None:
    module = torch.nn.Module()
    spec = ParamSpec((6, 2), Cut(0, Axis("tp", 2), (6,)))
    module.weight = parameter(spec, device=torch.device("meta"), dtype=torch.bfloat16)
    assert (module.weight.shape, module.weight.dtype) == ((3, 2), torch.bfloat16)
    assert specs_of(module) == {"weight": spec}
