"""Initial weights do not depend on the layout, and are normal."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pentode.dist.mesh import Axis
from pentode.nn import init
from pentode.nn.init import initialise
from pentode.ops.random import key_of, mix
from pentode.parallel.spec import Cut, ParamSpec


def drawn(spec: ParamSpec, *, name: str = "w", seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    view = torch.full(spec.local_shape, torch.nan, dtype=dtype)
    initialise({name: view}, {name: spec}, std=0.02, residual_std=0.01, seed=seed)
    return view


@given(
    size=st.sampled_from((1, 2, 3, 4)),
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dim=st.integers(0, 1),
    other=st.integers(1, 37),
    padding=st.integers(0, 3),
)
def test_every_layout_draws_its_part_of_the_same_numbers_bit_for_bit(
    size: int, pieces: list[int], dim: int, other: int, padding: int
) -> None:
    sizes = tuple(12 * n for n in pieces)
    shape = [other, other]
    shape[dim] = sum(sizes) - (padding if len(sizes) == 1 else 0)
    whole = drawn(ParamSpec(tuple(shape)))
    for rank in range(size):
        spec = ParamSpec(tuple(shape), Cut(dim, Axis("tp", size, rank), sizes))
        assert torch.equal(drawn(spec), spec.take(whole))


def test_neither_chunks_nor_threads_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ParamSpec((999, 101))
    torch.set_num_threads(2)
    try:
        whole = drawn(spec)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(drawn(spec), whole)
    monkeypatch.setattr(init, "CHUNK", 777)
    assert torch.equal(drawn(spec), whole)


def test_the_numbers_are_normal_and_unrelated_between_neighbours_names_and_seeds() -> None:
    spec = ParamSpec((1024, 512))
    x = drawn(spec).double() / 0.02
    assert x.mean().abs() < 0.007  # 5 standard deviations
    assert (x.std() - 1).abs() < 0.005
    assert ((x**4).mean() - 3).abs() < 0.04
    others = {
        "next row": x.roll(1, 0),
        "next column": x.roll(1, 1),
        "other name": drawn(spec, name="v") / 0.02,
        "other seed": drawn(spec, seed=1) / 0.02,
    }
    for name, other in others.items():
        assert (x * other).mean().abs() < 0.007, name


def test_float64_begins_with_float32_s_numbers() -> None:
    spec = ParamSpec((64, 8))
    torch.testing.assert_close(drawn(spec, dtype=torch.float64).float(), drawn(spec))


def test_each_kind_of_parameter_begins_as_its_spec_says() -> None:
    spec = ParamSpec((64, 64))
    assert drawn(dataclasses.replace(spec, init="residual")).std().item() == pytest.approx(0.01, rel=0.05)
    assert (drawn(dataclasses.replace(spec, init="ones")) == 1).all()
    assert (drawn(dataclasses.replace(spec, init="zeros")) == 0).all()


def test_the_hash_is_splitmix64_s() -> None:
    # The generator's first outputs from the state 1234567: a state goes up by a constant, and its mix is the output.
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    states = 1234567 + torch.arange(1, 6) * -7046029254386353131
    assert [number % 2**64 for number in mix(states).tolist()] == want


def test_keys_differ_by_part_and_order_and_stay_the_same_for_ever() -> None:
    assert len({key_of("a", 1), key_of("a", 2), key_of("b", 1), key_of(1, "a"), key_of("a1")}) == 5
    assert key_of("layers.0.attn.qkv.weight", 42) == 3445092222102183064
