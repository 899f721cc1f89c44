"""Triton kernels: rotary positions of all heads of a fused layer, and back. Imported only where they run."""

import triton
import triton.language as tl
from torch import Tensor

PAIRS_A_THREAD = 16  # of features


@triton.jit
def _turn(
    heads: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    H: tl.tensor,
    K: tl.tensor,
    E: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    first, second = _places(pair, E, INTERLEAVED)
    c, s = _angles(cos, sin, token, pair, E)
    inside = (head < H + K) & (pair < E // 2)
    here = heads + token * (H + 2 * K) * E + head * E
    a = tl.load(here + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(here + second, mask=inside, other=0.0).to(tl.float32)
    y, z = (a * c - b * s).to(q.dtype.element_ty), (b * c + a * s).to(q.dtype.element_ty)
    of_q, of_k = inside & (head < H), inside & (head >= H)
    q_here, k_here = q + (token * H + head) * E, k + (token * K + head - H) * E
    tl.store(q_here + first, y, mask=of_q)
    tl.store(q_here + second, z, mask=of_q)
    tl.store(k_here + first, y, mask=of_k)
    tl.store(k_here + second, z, mask=of_k)


@triton.jit
def _turn_back(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    heads: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    H: tl.tensor,
    K: tl.tensor,
    E: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    first, second = _places(pair, E, INTERLEAVED)
    c, s = _angles(cos, sin, token, pair, E)
    inside = (head < H + 2 * K) & (pair < E // 2)
    of_q, of_k, of_v = inside & (head < H), inside & (head >= H) & (head < H + K), inside & (head >= H + K)
    q_here, k_here = q + (token * H + head) * E, k + (token * K + head - H) * E
    v_here = v + (token * K + head - H - K) * E
    a = _one_of(q_here + first, k_here + first, of_q, of_k)
    b = _one_of(q_here + second, k_here + second, of_q, of_k)
    y = tl.where(of_v, tl.load(v_here + first, mask=of_v, other=0.0).to(tl.float32), a * c + b * s)
    z = tl.where(of_v, tl.load(v_here + second, mask=of_v, other=0.0).to(tl.float32), b * c - a * s)
    here = heads + token * (H + 2 * K) * E + head * E
    tl.store(here + first, y.to(heads.dtype.element_ty), mask=inside)
    tl.store(here + second, z.to(heads.dtype.element_ty), mask=inside)


@triton.jit
def _one_of(q: tl.tensor, k: tl.tensor, of_q: tl.tensor, of_k: tl.tensor) -> tl.tensor:
    a, b = tl.load(q, mask=of_q, other=0.0), tl.load(k, mask=of_k, other=0.0)
    return tl.where(of_q, a.to(tl.float32), b.to(tl.float32))


@triton.jit
def _places(pair: tl.tensor, E: tl.constexpr, INTERLEAVED: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    return (2 * pair, 2 * pair + 1) if INTERLEAVED else (pair, pair + E // 2)


@triton.jit
def _angles(
    cos: tl.tensor, sin: tl.tensor, token: tl.tensor, pair: tl.tensor, E: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    here = token * (E // 2) + pair
    return tl.load(cos + here, mask=pair < E // 2, other=0.0), tl.load(sin + here, mask=pair < E // 2, other=0.0)


def turn(heads: Tensor, cos: Tensor, sin: Tensor, *, kv_heads: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """q [T, H, E] and k [T, K, E] of `heads` [T, H + 2K, E], turned; all contiguous, on a GPU, angles in float32."""
    T, count, E = heads.shape
    q, k = heads.new_empty(T, count - 2 * kv_heads, E), heads.new_empty(T, kv_heads, E)
    sizes = _sizes(count - kv_heads, E)
    _turn[(T,)](heads, q, k, cos, sin, count - 2 * kv_heads, kv_heads, E, INTERLEAVED=interleaved, **sizes)
    return q, k


def turn_back(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """The gradient of `heads` [T, H + 2K, E] from those of q [T, H, E], k and v [T, K, E]; likewise."""
    (T, H, E), K = q.shape, k.shape[1]
    heads = q.new_empty(T, H + 2 * K, E)
    _turn_back[(T,)](q, k, v, heads, cos, sin, H, K, E, INTERLEAVED=interleaved, **_sizes(H + 2 * K, E))
    return heads


def _sizes(heads: int, E: int) -> dict[str, int]:
    """A program's tile, of one token, and its warps."""
    HEADS, PAIRS = triton.next_power_of_2(heads), triton.next_power_of_2(E // 2)
    return {"HEADS": HEADS, "PAIRS": PAIRS, "num_warps": min(max(HEADS * PAIRS // (32 * PAIRS_A_THREAD), 1), 16)}
