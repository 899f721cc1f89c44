"""Causal self-attention with grouped queries, its heads cut over tp; rotary positions and dropout where asked for.

T tokens, D width, B sequences, S tokens in each, H query heads and K key/value heads of this rank, E head size.
"""

from typing import Literal

from torch import Tensor, nn

from pentode.nn.cache import LayerCache
from pentode.nn.dropout import Dropout
from pentode.nn.shared import Shared
from pentode.ops.attention import attention, attention_with_dropout
from pentode.ops.rope import rotate_heads
from pentode.parallel.tensor import ColumnLinear, Place, RowLinear


class Attention(nn.Module):
    """out(softmax(q k^T / sqrt(E)) v), with q, k, v from one fused layer `qkv`.

    `dropout` acts on the probabilities. With rotary positions, q and k are turned by their tokens' angles. Key/value
    heads fewer than tp are held by several neighbouring ranks each (`place.tp_kv`), with their own query heads.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        place: Place,
        bias: bool = False,
        rotary: Literal["halves", "interleaved"] | None = None,
        dropout: Dropout | None = None,
    ) -> None:
        super().__init__()
        tp, copies = place.tp.size, place.tp_kv.size
        if heads % tp:
            raise ValueError(f"Attention: tp={tp} does not divide {heads} attention heads")
        if kv_heads * copies % tp:
            raise ValueError(f"Attention: tp={tp} does not divide {kv_heads} key/value heads, {copies} of each")
        self.place, self.head_dim, self.rotary, self.dropout = place, head_dim, rotary, dropout
        self.heads, self.kv_heads = heads // tp, kv_heads * copies // tp
        shared = place.tp_kv if copies > 1 else None
        self.qkv = ColumnLinear(
            width,
            (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim),
            place=place,
            bias=bias,
            copies=(None, shared, shared),
        )
        self.out = RowLinear(heads * head_dim, width, place=place, bias=bias)

    def empty_cache(self, rows: int, capacity: int) -> LayerCache:
        """A cache for `rows` sequences of up to `capacity` tokens."""
        weight = self.qkv.weight
        return LayerCache.empty(
            rows, capacity, heads=self.kv_heads, head_dim=self.head_dim, device=weight.device, dtype=weight.dtype
        )

    def forward(self, x: Tensor, shared: Shared, cache: LayerCache | None = None) -> Tensor:
        heads = self.qkv(x).unflatten(1, (-1, self.head_dim))  # [T, H + 2K, E]
        if self.rotary is None:
            q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        else:
            interleaved = self.rotary == "interleaved"
            q, k, v = rotate_heads(heads, shared.cos, shared.sin, kv_heads=self.kv_heads, interleaved=interleaved)
        q, k, v = (t.unflatten(0, (-1, shared.sequence_length)) for t in (q, k, v))  # [B, S, H or K, E]
        if cache is not None:
            k, v = cache.extend(k, v)
        y = self._attend(q, k, v, shared)  # [B, S, H, E]
        return self.out(y.flatten(2).flatten(0, 1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, shared: Shared) -> Tensor:
        drop = self.dropout
        if drop is None or not drop.acts:
            return attention(q, k, v)
        first = self.place.tp.rank * self.heads
        return attention_with_dropout(q, k, v, p=drop.p, keys=shared.keys, site=drop.site, head_start=first)
