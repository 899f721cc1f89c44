"""Dropout whose mask is a hash of where an element stands, not of how often a generator was asked.

It is therefore the same in every layout, when a block is recomputed and after a resume; there is no generator state to
save; and it traces under torch.compile. One 64-bit hash serves four neighbouring features, 16 bits each.
"""

import torch
from torch import Tensor

from pentode.ops.random import bits

DRAWS = 4  # 16-bit numbers in one hash; must not depend on the layout
LEVELS = 1 << 16


def token_keys(samples: Tensor, positions: Tensor, seed: Tensor) -> Tensor:
    """A key for each token from its sample's number [B] and its position [T]; `seed` is 0-d int64.  # [T] int64"""
    rows = bits(samples, seed).repeat_interleave(positions.numel() // samples.numel())
    return bits(positions, rows)


def dropout(x: Tensor, p: float, *, keys: Tensor, site: int | Tensor, feature_start: int = 0) -> Tensor:
    """Zero each element of x [T, D] with probability p and divide the others by 1 - p.

    keys           [T] int64, one a token, from `token_keys`
    site           which dropout of the model this is; inside compiled code a 0-d int64 tensor
    feature_start  the global number of x's first feature, where D is cut
    """
    if p == 0:
        return x
    first, stop = feature_start, feature_start + x.shape[1]
    groups = torch.arange(first // DRAWS, -(-stop // DRAWS), device=x.device)
    keep = keep_mask(p, keys=(keys + site)[:, None], groups=groups)  # [T, DRAWS * groups]
    return (x * kept_scale(p)).where(keep.narrow(1, first % DRAWS, stop - first), 0)


def keep_mask(p: float, *, keys: Tensor, groups: Tensor) -> Tensor:
    """True where dropout with probability p keeps; each key and each number of a group give DRAWS neighbours.

    keys [..., 1] and groups [..., G], both int64 and broadcast together -> [..., DRAWS * G] bool
    """
    return bits(groups, keys).view(torch.int16) >= _dropped_levels(p) - LEVELS // 2


def kept_scale(p: float) -> float:
    """What to multiply by after `keep_mask`, so that the mean stays: 1 / the rate that 16-bit draws really keep."""
    return LEVELS / (LEVELS - _dropped_levels(p))


def _dropped_levels(p: float) -> int:
    return min(round(p * LEVELS), LEVELS - 1)
