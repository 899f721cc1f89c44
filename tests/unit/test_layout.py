"""Layouts of flat buffers: every parameter aligned, whole in one bucket, and no more padding than that takes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pentode.optim.layout import ALIGN, block_of, lay_out

names_and_sizes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 700)), min_size=1, max_size=8)


@given(names_and_sizes, st.integers(1, 3000), st.integers(1, 5))
def test_a_layout_is_aligned_whole_and_divisible(
    blocks: list[tuple[int, int]], bucket_elements: int, ranks: int
) -> None:
    shapes = {"embed.weight": (5, 30)}
    shapes |= {f"layers.{i}.part{j}.weight": (size + j,) for i, (n, size) in enumerate(blocks) for j in range(n)}
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    layout = lay_out(shapes, bucket_elements=bucket_elements, ranks=ranks)
    assert list(layout.starts) == list(shapes)
    assert [name for bucket in layout.buckets for name in bucket.names] == list(shapes)
    edges = [0, *(bucket.stop for bucket in layout.buckets)]
    assert edges[:-1] == [bucket.start for bucket in layout.buckets]
    assert edges[-1] == layout.size
    for bucket in layout.buckets:
        assert (bucket.stop - bucket.start) % (ranks * ALIGN) == 0
    for bucket in layout.buckets[1:]:
        assert bucket.stop - bucket.start >= bucket_elements
    homes = {}
    for k, bucket in enumerate(layout.buckets):
        for name in bucket.names:
            assert layout.starts[name] % ALIGN == 0
            assert bucket.start <= layout.starts[name]
            assert homes.setdefault(block_of(name), k) == k
    assert layout.size < elements + ALIGN * len(shapes) + ranks * ALIGN * len(layout.buckets), (
        "more padding than needed"
    )
    buffer = torch.zeros(layout.size)
    for view in layout.views(buffer).values():
        view += 1
    assert buffer.max() == 1  # nothing overlaps
    assert buffer.sum() == elements
