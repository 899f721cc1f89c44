"""Where each parameter lies in a flat buffer: aligned, in buckets of whole blocks. Pure arithmetic, no tensors made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import NamedTuple

from torch import Tensor

ALIGN = 128  # elements: 256 bytes of bfloat16, the narrowest kind; compiled kernels copy inputs that start unaligned


@dataclass(frozen=True)
class Bucket:
    """Elements [start, stop) of a buffer: whole blocks, reduced by one collective."""

    start: int
    stop: int
    names: tuple[str, ...]


class Range(NamedTuple):
    """Neighbouring elements of a parameter in a part of a buffer: where they begin in each, and how many they are."""

    name: str
    in_parameter: int
    in_part: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Places of parameters in a buffer of `size` elements; elements of no parameter are padding and stay zero."""

    size: int
    starts: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    buckets: tuple[Bucket, ...]

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Each parameter's part of the buffer [size], in its shape."""
        return {
            name: buffer[start : start + prod(self.shapes[name])].view(self.shapes[name])
            for name, start in self.starts.items()
        }

    def ranges(self, start: int, stop: int) -> list[Range]:
        """What elements [start, stop) of the buffer are of which parameters; padding is left out."""
        found = []
        for name, first in self.starts.items():
            begin, end = max(start, first), min(stop, first + prod(self.shapes[name]))
            if begin < end:
                found.append(Range(name, begin - first, begin - start, end - begin))
        return found

    def cut(self, buffer: Tensor) -> list[Tensor]:
        """The buffer [size] bucket by bucket."""
        return [buffer[bucket.start : bucket.stop] for bucket in self.buckets]


def lay_out(shapes: Mapping[str, tuple[int, ...]], *, bucket_elements: int, ranks: int) -> Layout:
    """Put parameters side by side, in their order.

    Blocks are gathered from the last to the first, as backward completes them, until a bucket has `bucket_elements`; so
    the bucket that completes last, whose reduction nothing hides, is the one that may be small. A bucket's length is a
    multiple of ranks * ALIGN, so that it can be cut over `ranks`.
    """
    starts, buckets, end = {}, [], 0
    for names in _gather(shapes, bucket_elements):
        begin = end
        for name in names:
            starts[name] = end
            end += _round_up(prod(shapes[name]), ALIGN)
        end = begin + _round_up(end - begin, ranks * ALIGN)
        buckets.append(Bucket(begin, end, tuple(names)))
    return Layout(end, starts, dict(shapes), tuple(buckets))


def block_of(name: str) -> str:
    """The block that a parameter belongs to: `layers.3` of `layers.3.attn.qkv.weight`, `embed` of `embed.weight`."""
    head, *rest = name.split(".")
    return f"{head}.{rest[0]}" if rest and rest[0].isdigit() else head


def _gather(shapes: Mapping[str, tuple[int, ...]], bucket_elements: int) -> list[list[str]]:
    """Names, bucket by bucket, in the order of `shapes`."""
    blocks = [list(names) for _, names in groupby(shapes, key=block_of)]
    buckets: list[list[str]] = []
    filled = bucket_elements  # the first block opens a bucket
    for block in reversed(blocks):
        if filled >= bucket_elements:
            buckets.append([])
            filled = 0
        buckets[-1] = block + buckets[-1]
        filled += _elements(shapes, block)
    return buckets[::-1]


def _elements(shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]) -> int:
    return sum(_round_up(prod(shapes[name]), ALIGN) for name in names)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
