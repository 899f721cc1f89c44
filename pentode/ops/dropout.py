"""Dropout whose mask is a hash of where an element stands, not of how often a generator was asked.

It is therefore the same in every layout, when a block is recomputed and after a resume; there is no generator state to
save; and it traces under torch.compile. One 64-bit hash serves four neighbouring features, 16 bits each.
"""

import torch
from torch import Tensor

from pentode.ops.random import GAMMA, bits, mix

DRAWS = 4  # 16-bit numbers in one hash; must not depend on the layout
LEVELS = 1 << 16


def token_keys(samples: Tensor, positions: Tensor, seed: Tensor) -> Tensor:
    """A key for each token from its sample's number [B] and its position [T]; `seed` is 0-d int64.  # [T] int64"""
    rows = bits(samples, seed).repeat_interleave(positions.numel() // samples.numel())
    return mix(rows + positions * GAMMA)


def dropout(x: Tensor, p: float, *, keys: Tensor, site: int | Tensor, feature_start: int = 0) -> Tensor:
    """Zero each element of x [T, D] with probability p and divide the others by 1 - p.

    keys           [T] int64, one a token, from `token_keys`
    site           which dropout of the model this is; inside compiled code a 0-d int64 tensor
    feature_start  the global number of x's first feature, where D is cut
    """
    if p == 0:
        return x
    keep = keep_mask(p, keys=keys, site=site, features=range(feature_start, feature_start + x.shape[1]))
    return apply_mask(x, keep, p)


def keep_mask(p: float, *, keys: Tensor, site: int | Tensor, features: range) -> Tensor:
    """True where dropout with probability p keeps the feature of the token.  # [T, len(features)] bool"""
    first_group, last_group = features.start // DRAWS, -(-features.stop // DRAWS)
    groups = torch.arange(first_group, last_group, device=keys.device)
    hashes = bits(groups, bits(keys, site)[:, None])  # [T, groups]
    draws = hashes.view(torch.int16).narrow(1, features.start - first_group * DRAWS, len(features))
    return draws >= _dropped_levels(p) - LEVELS // 2


def apply_mask(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """x where kept, scaled so that its mean stays what it was; 0 elsewhere."""
    # Scaled by the rate that the 16-bit draws really have, so that the mean is exact for every p.
    return torch.where(keep, x * (LEVELS / (LEVELS - _dropped_levels(p))), 0.0)


def _dropped_levels(p: float) -> int:
    return min(round(p * LEVELS), LEVELS - 1)
