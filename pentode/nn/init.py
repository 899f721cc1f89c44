"""The numbers that weights begin with: the same for every layout, since each is a hash of its global place and name."""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from pentode import device as devices
from pentode.ops.random import key_of, normal
from pentode.parallel.spec import Box, ParamSpec

# Elements drawn at a time: bounds the temporaries, and keeps them in a processor's cache; a GPU wants more at once.
CHUNK, GPU_CHUNK = 1 << 16, 1 << 23


@torch.no_grad()
def initialise(
    views: Mapping[str, Tensor], specs: Mapping[str, ParamSpec], *, std: float, residual_std: float, seed: int
) -> None:
    """Fill each view (float32 or float64) in place with what its spec asks for; padding becomes zero.

    "normal" is N(0, std), "residual" N(0, residual_std), for the projections back into the residual stream.
    """
    scales = {"normal": std, "residual": residual_std}
    for name, view in views.items():
        spec = specs[name]
        if spec.init == "ones":
            view.fill_(1)
            continue
        view.zero_()
        if spec.init in scales:
            for box in spec.boxes():
                _draw(box.of_local(view), box, spec, scales[spec.init], key_of(name, seed))


def _draw(part: Tensor, box: Box, spec: ParamSpec, scale: float, key: int) -> None:
    """Fill one box, some rows at a time."""
    rows = max(1, (GPU_CHUNK if devices.is_gpu(part.device) else CHUNK) // prod(box.shape[1:]))
    for start in range(0, box.shape[0], rows):
        chunk = part[start : start + rows]
        counters = _global_indices(chunk.shape, spec, (box.global_start[0] + start, *box.global_start[1:]), part.device)
        chunk.copy_(normal(counters, key, dtype=part.dtype).mul_(scale))


def _global_indices(shape: torch.Size, spec: ParamSpec, start: tuple[int, ...], device: torch.device) -> Tensor:
    """The place of each element in the flattened global tensor.  # `shape`, int64"""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for size, first, whole in zip(shape, start, spec.global_shape, strict=True):
        index = (index * whole)[..., None] + torch.arange(first, first + size, device=device)
    return index
