"""The output layer and its cross-entropy, with the vocabulary cut over tp, in slices so that whole logits never exist.

T tokens, D width, V rows of the vocabulary held here, n tokens of a slice.
"""
# An autograd Function gives its context attributes and its backward a signature that torch's stubs do not know.
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pentode.dist import collectives
from pentode.dist.mesh import Axis
from pentode.ops import fused_products
from pentode.ops.cross_entropy import MOST_PRODUCTS, PLAIN, Passes
from pentode.ops.fused_products import MULTIPLE
from pentode.ops.gradient_sum import GradientSum, sum_of
from pentode.parallel.batch import IGNORE

# Of logits at one time: whole for a small model, 8,192 tokens in bfloat16 for a vocabulary of 128K. Each slice costs an
# addition of the weight's shape, so few large ones are faster (docs/performance.md).
SLICE_BYTES = 2 << 30


class Vocab(NamedTuple):
    """How the vocabulary is cut: its true size, and the axis; rows past its size are padding.

    passes  how the loss goes over its logits: in plain form, compiled, or by kernels of ours
    """

    size: int
    tp: Axis
    passes: Passes = PLAIN

    def held(self, rows: int) -> int:
        """How many of this rank's `rows` belong to the true vocabulary."""
        return min(max(self.size - self.tp.rank * rows, 0), rows)


def vocab_logits(x: Tensor, weight: Tensor, *, vocab: Vocab) -> Tensor:
    """x W^T over the whole vocabulary, for generation and tests, not for the loss.

    x       [T, D]
    y       [T, vocabulary], alike on all ranks
    weight  [V, D] of [vocabulary, D]

    group     tp
    forward   all-gather of y along the vocabulary
    backward  reduce-scatter of y's grad, which every rank must hold as its own part of a sum
    gradient  of weight: complete for the rows held here; of x: partial over tp
    """
    return collectives.all_gather(x @ weight.T, vocab.tp, dim=1)[:, : vocab.size]


def vocab_loss(x: Tensor, weight: Tensor, labels: Tensor, *, vocab: Vocab, z_loss: float = 0.0) -> Tensor:
    """The cross-entropy of x W^T against the labels, summed over the tokens whose label is not IGNORE.

        x       [T, D]; labels [T] int64
        loss    0-d, float32 or x's dtype if that is wider, alike on all ranks
        weight  [V, D] of [vocabulary, D]

        group     tp
        forward   all-reduce (of a sum, a maximum, a sum) of [n] numbers, three times a slice
        backward  nothing: forward has made the gradients, and backward scales them
        gradient  of weight: complete for the rows held here; of x: partial over tp, summed by the layer that made x
                  (`Place.enter`)
    Keeps the gradients of x and weight from forward to backward, in place of the logits; the weight's is added to its
    sum, where there is one: in forward, where the loss's own gradient is known by then, and a product can add. `z_loss`
    adds that much of each valid token's squared log-sum-exp, which keeps the logits from drifting (arXiv:2204.02311,
    section 5).
    """
    if torch.is_grad_enabled():
        return _VocabLoss.apply(x, weight, labels, vocab, z_loss)
    slices = _slices(x.shape[0], weight.shape[0] * x.itemsize)
    losses = [_slice_loss(x[rows] @ weight.T, labels[rows], vocab, z_loss, differentiate=False) for rows in slices]
    return torch.stack(losses).sum()


class _VocabLoss(torch.autograd.Function):
    """forward: loss and gradients, slice by slice; backward: the gradients times the loss's own."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, labels: Tensor, vocab: Vocab, z_loss: float) -> Tensor:
        losses, grad_x = [], torch.empty_like(x)
        found, slices = sum_of(weight), _slices(x.shape[0], weight.shape[0] * x.itemsize)
        scale = _known_scale(found, [x[rows] for rows in slices], weight)
        products: list[Tensor] = []  # whose sum is the weight's gradient, where none is added at once
        for rows in slices:
            logits = x[rows] @ weight.T
            losses.append(_slice_loss(logits, labels[rows], vocab, z_loss, differentiate=True))
            grad = logits
            torch.mm(grad, weight, out=grad_x[rows])
            if found is None or scale is None:
                products.append(grad.T @ x[rows])
            else:
                fused_products.add_weight_gradient(grad, x[rows], found, scale)
            del logits, grad  # before the next slice's are made
            if len(products) == MOST_PRODUCTS:
                total = torch.empty_like(products[0], dtype=torch.promote_types(x.dtype, torch.float32))
                vocab.passes.total_(products, torch.ones_like(losses[0]), total, False)
                products = [total]
        ctx.save_for_backward(grad_x, *products)
        ctx.passes, ctx.sum = vocab.passes, found
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, *products = ctx.saved_tensors
        if not products:
            return grad_x * grad, None, None, None, None
        grad_weight = torch.empty_like(products[0], dtype=grad_x.dtype) if ctx.sum is None else ctx.sum.total
        ctx.passes.total_(products, grad, grad_weight, ctx.sum is not None and ctx.sum.begin())
        return grad_x * grad, grad_weight if ctx.sum is None else None, None, None, None


def _known_scale(found: GradientSum | None, slices: list[Tensor], weight: Tensor) -> Tensor | None:
    """The loss's own gradient, where forward knows it, and a product of each slice of x can add to the weight's sum."""
    if found is None or found.loss_scale is None or not all(fused_products.serves(x, weight) for x in slices):
        return None
    return found.loss_scale


def _slices(tokens: int, bytes_per_token: int) -> list[slice]:
    """Cut the tokens evenly into as few slices as SLICE_BYTES allows; into multiples of MULTIPLE, if so many fit."""
    most = max(SLICE_BYTES // bytes_per_token, 1)
    multiple = MULTIPLE if most >= MULTIPLE else 1
    count = -(-tokens // (most // multiple * multiple))
    rows = -(-tokens // (count * multiple)) * multiple
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def _slice_loss(logits: Tensor, labels: Tensor, vocab: Vocab, z_loss: float, *, differentiate: bool) -> Tensor:
    """A slice's summed loss; to differentiate, logits [n, V] become the gradient with respect to them."""
    tp, rows = vocab.tp, logits.shape[1]
    held = vocab.held(rows)
    if differentiate and tp.size == 1 and vocab.passes.whole_ is not None:
        return _whole_loss(logits, labels, held, z_loss, vocab.passes.whole_)
    valid = labels != IGNORE
    row = labels - tp.rank * rows
    here = valid & (row >= 0) & (row < held)
    row = row.where(here, 0)
    own_top, own_total = _statistics(logits, held, vocab.passes)

    own = logits.gather(1, row[:, None])[:, 0].to(own_top.dtype)
    picked = collectives.all_reduce(own.where(here, 0), tp)
    top = collectives.all_max(own_top, tp)
    total = collectives.all_reduce(own_total * (own_top - top).exp(), tp)
    log_total = total.log() + top
    loss = (log_total - picked + z_loss * log_total.square()).where(valid, 0).sum()
    if differentiate:
        factor = (1 + 2 * z_loss * log_total).where(valid, 0)
        vocab.passes.gradient_(logits, held, log_total, factor, here.to(factor.dtype), row)
    return loss


def _whole_loss(
    logits: Tensor,
    labels: Tensor,
    held: int,
    z_loss: float,
    pass_: Callable[[Tensor, int, Tensor, int, float], Tensor],
) -> Tensor:
    """The same, to differentiate, where the whole vocabulary is here: in one pass."""
    valid = labels != IGNORE
    picked = logits.gather(1, labels.where(valid, 0)[:, None])[:, 0].float()
    log_total = pass_(logits, held, labels, IGNORE, z_loss)
    return (log_total - picked + z_loss * log_total.square()).where(valid, 0).sum()


def _statistics(logits: Tensor, held: int, passes: Passes) -> tuple[Tensor, Tensor]:
    """Of each row the maximum, and the sum of exponentials below it; of a rank that holds padding alone, of nothing."""
    if held:
        return passes.statistics(logits, held)
    nothing = logits.new_zeros(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))
    return nothing - torch.inf, nothing
