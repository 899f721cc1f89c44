"""Norms over the last dimension, computed in at least float32 whatever the dtype of x, and rounded once, at the end."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467)."""
    return F.rms_norm(x, weight.shape, weight, eps)  # widens bfloat16 itself, bit for bit as a cast would


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias (arXiv:1607.06450)."""
    wide = torch.promote_types(x.dtype, torch.float32)  # F.layer_norm in bfloat16 is not its float32 result rounded
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)
