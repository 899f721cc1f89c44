"""The output layer and its cross-entropy, with the vocabulary cut over tp, in slices so that whole logits never exist.

T tokens, D width, V rows of the vocabulary held here, n tokens of a slice.
"""
# An autograd Function gives its context attributes and its backward a signature that torch's stubs do not know.
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pentode.dist import collectives
from pentode.dist.mesh import Axis
from pentode.parallel.batch import IGNORE

SLICE_BYTES = 256 << 20  # of logits at one time: whole for a small model, some 1,000 tokens for a vocabulary of 64K


class Vocab(NamedTuple):
    """How the vocabulary is cut: its true size, and the axis; rows past its size are padding."""

    size: int
    tp: Axis

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
    Keeps the gradients of x and weight from forward to backward, in place of the logits. `z_loss` adds that much of
    each valid token's squared log-sum-exp, which keeps the logits from drifting (arXiv:2204.02311, section 5).
    """
    if torch.is_grad_enabled():
        return _VocabLoss.apply(x, weight, labels, vocab, z_loss)
    slices = _slices(x.shape[0], weight.shape[0] * x.itemsize)
    return torch.stack([_slice_loss(x[rows], weight, labels[rows], vocab, z_loss)[0] for rows in slices]).sum()


class _VocabLoss(torch.autograd.Function):
    """forward: loss and gradients, slice by slice; backward: the gradients times the loss's own."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, labels: Tensor, vocab: Vocab, z_loss: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        loss = x.new_zeros((), dtype=wide)
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        for rows in _slices(x.shape[0], weight.shape[0] * wide.itemsize):
            slice_loss, grad = _slice_loss(x[rows], weight, labels[rows], vocab, z_loss)
            loss += slice_loss
            torch.mm(grad, weight, out=grad_x[rows])
            _add_product(grad_weight, grad.T, x[rows])
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, (grad_weight * grad).to(ctx.dtype), None, None, None


def _slices(tokens: int, bytes_per_token: int) -> list[slice]:
    """Cut the tokens evenly into as few slices as SLICE_BYTES allows."""
    count = -(-tokens * bytes_per_token // SLICE_BYTES)
    rows = -(-tokens // count)
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def _slice_loss(x: Tensor, weight: Tensor, labels: Tensor, vocab: Vocab, z_loss: float) -> tuple[Tensor, Tensor]:
    """A slice's summed loss, and its gradient with respect to the logits [n, V], in x's dtype."""
    tp, rows = vocab.tp, weight.shape[0]
    held = vocab.held(rows)
    logits = (x @ weight.T).to(torch.promote_types(x.dtype, torch.float32))
    logits[:, held:] = -torch.inf
    valid = labels != IGNORE
    row = labels - tp.rank * rows
    here = valid & (row >= 0) & (row < held)
    row = row.where(here, 0)[:, None]  # [n, 1]

    picked = collectives.all_reduce(logits.gather(1, row)[:, 0].where(here, 0), tp)
    top = collectives.all_max(logits.amax(dim=1), tp)
    exponentials = logits.sub_(top[:, None]).exp_()
    total = collectives.all_reduce(exponentials.sum(dim=1), tp)
    log_total = total.log() + top
    loss = (log_total - picked + z_loss * log_total.square()).where(valid, 0).sum()

    scale = ((1 + 2 * z_loss * log_total) / total).where(valid, 0)
    grad = exponentials.mul_(scale[:, None])
    grad.scatter_add_(1, row, -here[:, None].to(grad.dtype))
    return loss, grad.to(x.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
