"""The keys and values of the places already read, kept while generating. All sequences of a cache are equally long."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerCache:
    """One layer's keys and values [B, capacity, K, E], of which the first `length` places are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    @classmethod
    def empty(
        cls, rows: int, capacity: int, *, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> "LayerCache":
        """Room for `capacity` places of `rows` sequences."""
        keys, values = (torch.empty(rows, capacity, heads, head_dim, device=device, dtype=dtype) for _ in range(2))
        return cls(keys, values)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v [B, S, K, E]; all keys and values so far.  # 2 x [B, length, K, E]"""
        start, self.length = self.length, self.length + k.shape[1]
        if self.length > self.keys.shape[1]:
            raise ValueError(f"cache: {self.length} places, but room for {self.keys.shape[1]}; make it larger")
        self.keys[:, start : self.length] = k
        self.values[:, start : self.length] = v
        return self.keys[:, : self.length], self.values[:, : self.length]


@dataclass
class Cache:
    """A cache for each layer of a model, by the layer's name."""

    layers: dict[str, LayerCache]

    @property
    def length(self) -> int:
        """How many places are filled: the position of the next token."""
        return next(iter(self.layers.values())).length
