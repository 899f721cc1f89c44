"""Random numbers without state: each is a hash of its place and a key, so any part of them can be drawn anywhere.

The hash is splitmix64's finaliser (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014). torch has
no unsigned 64-bit arithmetic on all devices; two's complement wraps alike.
"""

from hashlib import blake2b
from math import pi

import torch
from torch import Tensor

_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, signed


def key_of(*parts: int | str) -> int:
    """A signed 64-bit key from names and numbers: the same on every machine, different for different parts."""
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser: every bit of the result depends on every bit of x (int64)."""
    x = _shift_right(x, 30).bitwise_xor_(x).mul_(_MULTIPLIERS[0])
    x = _shift_right(x, 27).bitwise_xor_(x).mul_(_MULTIPLIERS[1])
    return _shift_right(x, 31).bitwise_xor_(x)


def bits(counters: Tensor, key: int | Tensor) -> Tensor:
    """64 random bits for each counter (int64) and key; both may count up. In compiled code a key must be a tensor."""
    # Mixed before the key is added, so that no key is another one's continuation. Splitmix64's own counter, times a
    # 64-bit constant, would do as well, but inductor works that product out by itself and overflows.
    return mix(mix(counters) + key)


def normal(counters: Tensor, key: int, *, dtype: torch.dtype) -> Tensor:
    """One draw of N(0, 1) for each counter (int64); the same numbers in every dtype, up to its rounding."""
    drawn = bits(counters, key)
    # Box-Muller; 40 bits keep u1 away from 0, so the largest draw is about 7.4.
    u1 = _shift_right(drawn, 24).to(torch.float64).add_(0.5).mul_(2.0**-40)
    u2 = (drawn & 0xFFFFFF).to(torch.float64).mul_(2.0**-24 * 2 * pi)
    return u1.log_().mul_(-2).sqrt_().mul_(u2.cos_()).to(torch.float32).to(dtype)


def _shift_right(x: Tensor, count: int) -> Tensor:
    """Logical shift into a new tensor: int64's own copies the sign."""
    return (x >> count).bitwise_and_((1 << (64 - count)) - 1)
