"""Causal attention on one device, by fused kernels, and in plain form where its probabilities are needed.

B sequences, S queries and N keys in each (N > S while generating: the last S of N places ask), H query heads,
K key/value heads that serve H / K neighbouring query heads each, E head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pentode.ops import flash
from pentode.ops.dropout import DRAWS, keep_mask, kept_scale


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, where a query sees the keys up to its own place.

    q [B, S, H, E], k and v [B, N, K, E] -> [B, S, H, E]
    """
    if flash.serves(q, k):
        return flash.flash_attention(q, k, v)
    S, N = q.shape[1], k.shape[1]
    mask = None if S in (1, N) else _visible(S, N, q.device)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    gqa = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=S == N, enable_gqa=gqa)
    return y.transpose(1, 2)


def attention_with_dropout(
    q: Tensor, k: Tensor, v: Tensor, *, p: float, keys: Tensor, site: int | Tensor, head_start: int = 0
) -> Tensor:
    """`attention` in plain form, with dropout on its probabilities.

    keys        [B * S] int64, one a token, as `dropout` takes them
    site        which dropout of the model this is
    head_start  the global number of the first query head, where heads are cut
    """
    B, S, H, E = q.shape
    N, repeat = k.shape[1], H // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # [B * H, S or N, E]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)  # the fused kernels keep their scores in float32, too
    hidden = q.new_zeros(S, N).masked_fill_(~_visible(S, N, q.device), -torch.inf)
    scores = torch.baddbmm(hidden.expand(B * H, S, N), q, k.transpose(1, 2), alpha=E**-0.5)  # [B * H, S, N]
    probabilities = scores.softmax(dim=-1).to(v.dtype)
    per_head = -(-N // DRAWS)  # each head begins a group, so that any part of the heads draws whole groups
    groups = torch.arange(head_start * per_head, (head_start + H) * per_head, device=q.device)
    keep = keep_mask(p, keys=(keys + site).view(B, 1, S, 1), groups=groups.view(H, 1, per_head))
    kept = probabilities.where(keep[..., :N].flatten(0, 1), 0)
    y = torch.bmm(kept, v) * kept_scale(p)  # scaled here, where there are fewer numbers
    return y.unflatten(0, (B, H)).transpose(1, 2)


def _visible(queries: int, keys: int, device: torch.device) -> Tensor:
    """True where the query may see the key; the queries are the last places.  # [S, N] bool"""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
