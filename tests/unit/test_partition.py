"""Layers are cut into stages as well as any cut could, and the ends of the model are counted."""

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pentode.config.kinds.gpt2 import GPT2Config
from pentode.config.kinds.llama import LlamaConfig
from pentode.config.kinds.shape import Shape
from pentode.parallel.pipeline.partition import cut_layers, stage_costs, stage_layers

SMALL = LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=4, num_hidden_layers=8, vocab_size=100)


def every_cut(count: int, stages: int) -> Iterator[list[range]]:
    """All ways to cut layers into stages of one or more."""
    for inner in combinations(range(1, count), stages - 1):
        yield [range(begin, end) for begin, end in pairwise((0, *inner, count))]


def costs_of(cut: Sequence[range], layers: Sequence[int], first: int, last: int) -> list[int]:
    """What each stage of a cut costs."""
    found = [sum(layers[i] for i in own) for own in cut]
    found[0] += first
    found[-1] += last
    return found


costs = st.lists(st.integers(0, 6), min_size=1, max_size=9)  # small numbers, so that many cuts are equally good


@given(st.data(), costs, st.integers(0, 8), st.integers(0, 20))
def test_no_cut_is_better(data: st.DataObject, layers: list[int], first: int, last: int) -> None:
    stages = data.draw(st.integers(1, len(layers)))
    cut = cut_layers(layers, stages=stages, first=first, last=last)

    def badness(other: list[range]) -> tuple[int, int, list[int]]:
        found = costs_of(other, layers, first, last)
        return max(found), sum(cost**2 for cost in found), [own.start for own in other]

    assert cut == min(every_cut(len(layers), stages), key=badness)


@given(st.integers(1, 12), st.integers(1, 12))
def test_every_layer_is_held_once_in_order(count: int, stages: int) -> None:
    if stages <= count:
        cut = cut_layers([1.5] * count, stages=stages)
        assert [layer for own in cut for layer in own] == list(range(count))
        sizes = [len(own) for own in cut]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("layers", "stages", "ends", "sizes"),
    [
        (8, 4, {}, [2, 2, 2, 2]),
        (10, 4, {}, [2, 2, 3, 3]),  # of equally good cuts, the one with the shorter stages first
        (8, 4, {"last": 1}, [2, 2, 2, 2]),
        (8, 4, {"last": 2}, [2, 2, 3, 1]),
        (8, 4, {"first": 2}, [1, 2, 2, 3]),
        (8, 2, {"last": 100}, [7, 1]),
        (3, 3, {"first": 9}, [1, 1, 1]),
        (5, 1, {"first": 9, "last": 9}, [5]),
    ],
)
def test_a_cut_known_by_hand(layers: int, stages: int, ends: dict[str, int], sizes: list[int]) -> None:
    cut = cut_layers([1] * layers, stages=stages, **ends)
    assert [len(own) for own in cut] == sizes


def test_the_slowest_stage_counts_before_the_rest_of_them() -> None:
    layers = [2, 2, 4, 1]  # 2 + 2 + 5 has the smaller sum of squares, 4 + 4 + 1 the faster slowest stage
    assert cut_layers(layers, stages=3) == [range(0, 2), range(2, 3), range(3, 4)]


@pytest.mark.parametrize(("count", "stages"), [(3, 4), (0, 1), (3, 0)])
def test_fewer_layers_than_stages_are_refused(count: int, stages: int) -> None:
    with pytest.raises(ValueError) as error:
        cut_layers([1] * count, stages=stages)
    assert str(error.value) == f"cut_layers: {count} layers for {stages} stages; each stage needs one layer or more"
    if count == 3:
        with pytest.raises(ValueError, match=f"{count} layers for {stages} stages"):
            stage_layers(GPT2Config(n_layer=count), stages=stages, sequence_length=8)


@pytest.mark.parametrize("shape", [SMALL, GPT2Config(n_embd=16, n_head=4, n_layer=8, n_positions=32, vocab_size=100)])
@pytest.mark.parametrize("stages", [1, 2, 5, 8])
def test_costs_are_those_of_all_layers_and_both_ends(shape: Shape, stages: int) -> None:
    layers = stage_layers(shape, stages=stages, sequence_length=32)
    found = stage_costs(shape, layers, sequence_length=32)
    layer = shape.matmul_parameters_per_layer + 32 * 16
    ends = [16 * (stage == 0) + 100 * 16 * (stage == stages - 1) for stage in range(stages)]
    assert found == [len(own) * layer + end for own, end in zip(layers, ends, strict=True)]
    forward = shape.causal_flops_per_sequence(32) / 3 / 2 / 32  # a third is forward; 2 operations a multiply-add
    assert sum(found) == forward + 16  # the look-up multiplies nothing


def test_a_large_vocabulary_takes_layers_from_the_last_stage() -> None:
    sizes = {}
    for vocab_size in (1, 1000):
        shape = SMALL.with_vocab_size(vocab_size)
        sizes[vocab_size] = [len(own) for own in stage_layers(shape, stages=4, sequence_length=32)]
    assert sizes == {1: [2, 2, 2, 2], 1000: [2, 2, 3, 1]}


def test_a_long_sequence_makes_layers_dearer_and_the_output_layer_lighter() -> None:
    shape = SMALL.with_vocab_size(1000)
    assert [len(own) for own in stage_layers(shape, stages=4, sequence_length=100_000)] == [2, 2, 2, 2]


def test_a_vocabulary_that_only_the_data_know_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is -1"):
        stage_layers(SMALL.with_vocab_size(-1), stages=2, sequence_length=8)
