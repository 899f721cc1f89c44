"""Rotary positions (arXiv:2104.09864), and the ways of stretching them to longer texts that Llama uses.

T tokens, H heads, E head size. Feature i turns together with feature i + E/2, as in Hugging Face's Llama, or, where
`interleaved`, feature 2i with 2i + 1, as in the paper.
"""

from math import pi

import torch
from torch import Tensor


def frequencies(head_dim: int, *, theta: float, dtype: torch.dtype) -> Tensor:
    """Radians per position of each pair of features.  # [E/2]"""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim)


def scale_llama3(
    frequencies: Tensor, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_positions: int
) -> Tensor:
    """Llama 3.1's stretching: slow waves by `factor`, fast ones not at all, those between by something between.

    A wave is slow if it turns fewer than `low_freq_factor` times within the positions that the model was first trained
    on, fast if it turns more than `high_freq_factor` times.
    """
    turns = original_positions * frequencies / (2 * pi)
    fast = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 - fast) * frequencies / factor + fast * frequencies


def angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each token's angles, in the dtype of the frequencies.  # 2 x [T, 1, E/2]"""
    turned = positions.to(frequencies.dtype)[:, None, None] * frequencies
    return turned.cos(), turned.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """x [T, H, E] turned by its tokens' angles; computed in the dtype of cos and sin, returned in that of x."""
    wide = x.to(cos.dtype)
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, dim=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    y = torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)
    return y.to(x.dtype)
