"""Attention by FlashAttention-4, of the package flash-attn-4, where it is installed and faster than torch's kernels.

The package is a beta, compiles its kernels when they are first asked for, and keeps them for later runs. What torch
compiles, and what is too small for it, torch's kernels do (docs/performance.md).
"""

import importlib.metadata
import os
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from pentode import device as devices
from pentode import log

GENERATIONS = (9, 10)  # of NVIDIA's GPUs, for which the package has these kernels: Hopper, Blackwell
LARGE = 5e10  # products of a query's number with a key's from which it is faster: its launch takes the host longer
MOST, MULTIPLE = 128, 8  # of head sizes
KEEP = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"  # what it compiled

Function = Callable[..., tuple[Tensor, Tensor | None]]


def is_usable(device: torch.device) -> bool:
    """Whether it is installed, and has kernels for this GPU."""
    return _function(device) is not None


def serves(q: Tensor, k: Tensor) -> bool:
    """Whether it is to do this attention, of q [B, S, H, E] and k [B, N, K, E]."""
    B, S, H, E = q.shape
    fits = q.dtype in (torch.bfloat16, torch.float16) and k.shape[1] == S and E <= MOST and E % MULTIPLE == 0
    return fits and B * H * S * S * E >= LARGE and devices.runs_kernels(q) and is_usable(q.device)


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention`, where it `serves`."""
    function = _function(q.device)
    assert function is not None, "it does not serve"
    return function(q, k, v, causal=True, deterministic=torch.are_deterministic_algorithms_enabled())[0]


@cache
def _function(device: torch.device) -> Function | None:
    """The package's function; None where it is not installed, does not work, or has no kernels for this GPU."""
    if devices.generation(device) not in GENERATIONS:
        return None
    os.environ.setdefault(KEEP, "1")  # read when it is imported
    try:
        from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

        version = importlib.metadata.version("flash-attn-4")
    except ImportError:
        return None
    except Exception as error:  # noqa: BLE001 - a beta, whose parts may not go with each other
        log.warning(f"flash-attn-4 is installed, but does not load ({type(error).__name__}: {error}); torch attends")
        return None
    warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted")  # which is not used
    log.info(f"Attention by FlashAttention-4 (flash-attn-4 {version})")
    return flash_attn_func
