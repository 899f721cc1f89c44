"""Which sample is read when: a pure function of (samples consumed in the stage, seed), so resuming needs one integer.

Nothing here knows ranks, micro-batches or the global batch, so changing them changes nothing in the order.
"""

import hashlib

import numpy as np

ROUNDS = 8  # of the Feistel network; fewer give visibly uneven orders of ten samples. Even: the halves end in place
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: its multiples spread evenly
WORD = (1 << 64) - 1


def sample_ids(first: int, count: int, *, length: int, seed: int) -> np.ndarray:
    """The samples at places `first` .. `first + count - 1` of a stage's order, int64 [count], each below `length`.

    Each epoch, `length` places long, visits each sample once, in an order of its own.
    """
    places = np.arange(first, first + count, dtype=np.uint64)
    epochs, places = np.divmod(places, np.uint64(length))
    keys = mix(epochs * np.uint64(GOLDEN) + np.uint64(key_of(seed)))
    bits = (length - 1).bit_length()
    ids = _feistel(places, keys, bits=bits)
    outside = np.flatnonzero(ids >= length)
    while outside.size:  # the network permutes the next power of two: walk on until inside range(length)
        ids[outside] = _feistel(ids[outside], keys[outside], bits=bits)
        outside = outside[ids[outside] >= length]
    return ids.astype(np.int64)


def key_of(*parts: int | str) -> int:
    """64 bits that hash `parts`: the same on every machine and Python."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def mix(x: np.ndarray) -> np.ndarray:
    """Each uint64 of `x` hashed: the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _feistel(x: np.ndarray, keys: np.ndarray, *, bits: int) -> np.ndarray:
    """A permutation of the numbers of `bits` bits, one permutation for each key."""
    shift = np.uint64(bits - bits // 2)
    masks = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)  # of the left and the right half
    left, right = x >> shift, x & masks[1]
    for r in range(ROUNDS):
        hashed = mix(right ^ (keys + np.uint64(r * GOLDEN & WORD)))
        left, right = right, left ^ (hashed & masks[r % 2])
    return left << shift | right
