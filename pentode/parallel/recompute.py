"""Activation checkpointing: what backward computes again instead of keeping (arXiv:1604.06174), block by block or less.

Dropout masks are hashes of places (`ops/dropout.py`), so there is no random state to bring back.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, ParamSpec

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pentode.dist.collectives import SUMS
from pentode.ops import flash
from pentode.parallel import tensor_overlap

Mode = Literal[True, False, "selective", "activation"]
P = ParamSpec("P")

# What takes long, or a message, to have again. Products of attention in plain form (bmm) are large and are not kept.
KEPT = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_mm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        flash.OPERATOR,
        *SUMS,
        *tensor_overlap.OPERATORS,
    }
)

KEPT_IN_WORDS = f"keeps {sorted(map(str, KEPT))}"  # the policy, for torch's cache of compiled graphs


def recomputing(run: Callable[P, Tensor], mode: Mode) -> Callable[P, Tensor]:
    """`run`, made to keep less for backward.

    False        keeps all that backward needs
    True         keeps its arguments, and runs again in backward
    "selective"  keeps what KEPT lists besides, and computes the rest again: norms, activations, gathered inputs
    "activation"  is what feed-forward layers see to (`again`, below): here it keeps all

    forward   as `run`
    backward  moves what `run` moves forward once more, but for what is kept and what nobody needs; then as `run`

    To be compiled, this result is compiled whole: a compiled `run` inside would give silently wrong gradients.
    """
    if mode is False or mode == "activation":
        return run
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    contexts.cache_hash = KEPT_IN_WORDS  # pyright: ignore[reportAttributeAccessIssue]

    def whole(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def selective(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)

    return whole if mode is True else selective


def again(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """run(x), of which backward keeps x alone.

    forward   as `run`
    backward  as `run` forward once more, until all that its operators keep is there again; then as `run`
    """
    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)


def _policy(_: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
