"""torch's fused AdamW over a list of tensors: the only caller of that private operator."""

import torch
from torch import Tensor

from pentode import device as devices


def adamw_(
    weights: list[Tensor],
    gradients: list[Tensor],
    moments: tuple[list[Tensor], list[Tensor]],
    *,
    updates: Tensor,
    learning_rate: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    divide_by: Tensor | None,
    skip: Tensor,
) -> None:
    """One update in place, of gradients / divide_by, in one kernel; nothing is written where `skip` is 1.

    updates, divide_by, skip  float32, 0-d, on the device; `updates` counts this one already
    learning_rate             a number, or 0-d on the device
    The gradients are scaled in place.
    """
    torch._fused_adamw_(
        weights,
        gradients,
        moments[0],
        moments[1],
        [],
        [updates] * len(weights),
        lr=_readable(learning_rate),
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=divide_by,
        found_inf=skip,
    )


def _readable(learning_rate: float | Tensor) -> float | Tensor:
    """The rate as the operator reads it: a GPU's takes a tensor for a float32."""
    on_gpu = isinstance(learning_rate, Tensor) and devices.is_gpu(learning_rate.device)
    return learning_rate.float() if on_gpu else learning_rate


def usable(like: Tensor) -> bool:
    """Whether this torch has the operator for tensors of this dtype on this device: one element is tried."""
    weight, gradient, first, second = torch.zeros(4, dtype=like.dtype, device=like.device).split(1)
    one = torch.ones((), device=like.device)
    try:
        adamw_(
            [weight],
            [gradient],
            ([first], [second]),
            updates=one,
            learning_rate=torch.zeros((), dtype=torch.float64, device=like.device),
            betas=(0.9, 0.999),
            eps=1.0,
            weight_decay=0.0,
            divide_by=one,
            skip=one,
        )
    except (AttributeError, RuntimeError, TypeError):  # this torch lacks it; there is no other way to ask
        return False
    return True
