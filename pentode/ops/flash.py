"""Attention by FlashAttention-4, of the package flash-attn-4, where it is installed and faster than torch's kernels.

The package is a beta, compiles its kernels when they are first asked for, and keeps them for later runs. What is too
small for it torch's kernels do (docs/performance.md).
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pentode import device as devices
from pentode.ops.kernel_package import KernelPackage

LARGE = 5e10  # products of a query's number with a key's from which it is faster: its launch takes the host longer
MOST, MULTIPLE = 128, 8  # of head sizes


class Functions(NamedTuple):
    """The package's two directions."""

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]


def _functions() -> Functions:
    """They take what they are given here, or this raises."""
    from flash_attn.cute import interface  # pyright: ignore[reportMissingImports]

    found = Functions(interface._flash_attn_fwd, interface._flash_attn_bwd)
    inspect.signature(found.forward).bind(**dict.fromkeys(("q", "k", "v", "causal", "return_lse")))
    named = ("q", "k", "v", "out", "dout", "lse", "causal", "deterministic")
    inspect.signature(found.backward).bind(**dict.fromkeys(named))
    warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted")  # which is not used
    return found


PACKAGE = KernelPackage(
    "flash-attn-4",
    generations=(9, 10),  # Hopper, Blackwell
    functions=_functions,
    does="Attention by FlashAttention-4",
    instead="torch attends",
)


def serves(q: Tensor, k: Tensor) -> bool:
    """Whether it is to do this attention, of q [B, S, H, E] and k [B, N, K, E]."""
    B, S, H, E = q.shape
    fits = q.dtype in (torch.bfloat16, torch.float16) and k.shape[1] == S and E <= MOST and E % MULTIPLE == 0
    return fits and B * H * S * S * E >= LARGE and devices.has_kernels(q) and PACKAGE.is_usable(q.device)


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention`, where it `serves`."""
    return OPERATOR(q, k, v)[0]


# Defined so, and not by torch.library.custom_op, whose operators import torch's compiler when they are first called.
_LIBRARY = torch.library.Library("pentode", "FRAGMENT")
_LIBRARY.define("flash_attention(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
_LIBRARY.define(
    "flash_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor y, Tensor sums)"
    " -> (Tensor, Tensor, Tensor)"
)


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, S, H, E], and the logarithms of the sums of its exponentials, [B, H, S] float32."""
    y, sums, *_ = PACKAGE.on(q.device).forward(q=q, k=k, v=v, causal=True, return_lse=True)
    return y.contiguous(), sums.contiguous()


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in their shapes."""
    operands = {"q": q, "k": k, "v": v, "out": y, "dout": grad.contiguous(), "lse": sums}
    same_bits = torch.are_deterministic_algorithms_enabled()
    dq, dk, dv, *_ = (
        t.contiguous() for t in PACKAGE.on(q.device).backward(**operands, causal=True, deterministic=same_bits)
    )
    return dq, dk, dv


def _fake_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, S, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, S, dtype=torch.float32)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)  # none comes for the sums


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return BACKWARD(grad, *ctx.saved_tensors)


for _name, _real, _fake in (
    ("flash_attention", _forward, _fake_forward),
    ("flash_attention_backward", _backward, _fake_backward),
):
    _LIBRARY.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pentode::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("pentode::flash_attention", _differentiate, setup_context=_keep, lib=_LIBRARY)
OPERATOR = torch.ops.pentode.flash_attention.default
BACKWARD = torch.ops.pentode.flash_attention_backward.default


@register_flop_formula(torch.ops.pentode.flash_attention)
def _flops(q: tuple[int, ...], *_: object, **__: object) -> int:
    """As torch counts its own attention, with the scores that are masked: by this a compiler weighs what to keep."""
    B, S, H, E = q
    return 4 * B * H * S * S * E
