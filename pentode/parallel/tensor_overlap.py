"""Tensor-parallel linears that communicate while they multiply: the same numbers as the plain ones in `tensor.py`.

A product over all tokens is cut into one for each rank's tokens. While one part is multiplied, the next is on its way
(the ring of arXiv:2305.06942, section 3, with one hop a message, which switched links are made for):

    gather, then multiply    this rank's tokens first; those of the others as they come
    multiply, then scatter   the others' tokens first, each sent on when it is done; this rank's last

The operators are opaque to torch.compile, which would otherwise wait for each message where it is sent.

T tokens, T/tp of them on each rank between cut layers; D features there, F of this rank's inside.
"""
# An autograd Function gives its context attributes and its backward a signature that torch's stubs do not know.
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pentode.dist.collectives import group_of, start_sum_
from pentode.dist.mesh import Axis
from pentode.dist.p2p import Receipt, Ring


def gathered_linear(x: Tensor, weight: Tensor, tp: Axis, *, gather_again: bool) -> Tensor:
    """y = x W^T of all tokens, with W's rows cut over tp.

        x       [T/tp, D]
        y       [T, F]
        weight  [F, D] of [F tp, D]

    group     tp
    forward   all-gather of x along T, under the product
    backward  reduce-scatter of x's grad along T, under its product; with `gather_again` the all-gather of x once more
    gradient  of x: complete; of weight: complete for the part held here
    Keeps all of x, or this rank's tokens with `gather_again`.
    """
    return _GatheredLinear.apply(x, weight, tp, gather_again)


def scattered_linear(x: Tensor, weight: Tensor, tp: Axis) -> Tensor:
    """y = x W^T, with W's columns cut over tp.

        x       [T, F]
        y       [T/tp, D]
        weight  [D, F] of [D, F tp]

    group     tp
    forward   reduce-scatter of the product along T, under it
    backward  all-gather of the result's grad along T, under the product with it
    gradient  of x: complete; of weight: complete for the part held here
    Keeps x.
    """
    return _ScatteredLinear.apply(x, weight, tp)


def replicated_linear(x: Tensor, weight: Tensor, tp: Axis) -> Tensor:
    """y = x W^T, with W's rows cut over tp.

        x       [T, D], the same on all ranks
        y       [T, F]
        weight  [F, D] of [F tp, D]

    group     tp
    forward   nothing
    backward  all-reduce of x's grad, under the product for the weight's
    gradient  of x: complete; of weight: complete for the part held here
    Keeps x.
    """
    return _ReplicatedLinear.apply(x, weight, tp)


class _GatheredLinear(torch.autograd.Function):
    """forward: all-gather and product; backward: product and reduce-scatter, perhaps all-gather."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, tp: Axis, gather_again: bool) -> Tensor:
        ctx.tp, ctx.gather_again = tp, gather_again
        y, whole = gather_matmul(x, weight, True, not gather_again, *_address(tp))
        ctx.save_for_backward(x if gather_again else whole, weight)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        if ctx.gather_again:
            grad_x, x = matmul_scatter_gather(grad, weight, x, *_address(ctx.tp))
        else:
            grad_x = matmul_scatter(grad, weight, False, *_address(ctx.tp))
        return grad_x, grad.T @ x, None, None


class _ScatteredLinear(torch.autograd.Function):
    """forward: product and reduce-scatter; backward: all-gather and product."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        ctx.save_for_backward(x, weight)
        return matmul_scatter(x, weight, True, *_address(tp))

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x, whole = gather_matmul(grad.contiguous(), weight, False, True, *_address(ctx.tp))
        return grad_x, whole.T @ x, None


class _ReplicatedLinear(torch.autograd.Function):
    """forward: product; backward: all-reduce under the weight's product."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = matmuls_under_sum(grad.contiguous(), weight, x, *_address(ctx.tp))
        return grad_x, grad_weight, None


@torch.library.custom_op("pentode::gather_matmul", mutates_args=())
def gather_matmul(
    x: Tensor, weight: Tensor, transpose: bool, keep: bool, group: str, size: int, rank: int
) -> tuple[Tensor, Tensor]:
    """y = x W of all tokens (`transpose`: x W^T), and, to `keep`, all of x; else nothing of it.

        x       [T/tp, K]
        y       [T, N]; all of x [T, K], or [0, K]
        weight  [K, N], or [N, K] to transpose: this rank's part of a whole

    group     that of the name, of `size` ranks
    forward   all-gather of x along T, under the product
    backward  none: an operator without a gradient
    gradient  none; `gathered_linear` and `scattered_linear` say whose they are
    """
    factor = weight.T if transpose else weight
    tp = Axis("tp", size, rank, group_of(group))
    whole = x.new_empty(size, *x.shape)
    y = x.new_empty(size, x.shape[0], factor.shape[1])
    arriving = _start_gather(Ring(tp, device=x.device, nbytes=x.nbytes), x, whole)
    torch.mm(x, factor, out=y[rank])
    for number, part in arriving:
        part.wait()
        torch.mm(whole[number], factor, out=y[number])
    if keep:
        whole[rank] = x
    return y.flatten(0, 1), whole.flatten(0, 1) if keep else x.new_empty(0, x.shape[1])


@torch.library.custom_op("pentode::matmul_scatter", mutates_args=())
def matmul_scatter(x: Tensor, weight: Tensor, transpose: bool, group: str, size: int, rank: int) -> Tensor:
    """y = x W (`transpose`: x W^T) summed over the ranks, of this rank's tokens.

        x       [T, K]
        y       [T/tp, N]
        weight  [K, N], or [N, K] to transpose: this rank's part of a whole

    group     that of the name, of `size` ranks
    forward   reduce-scatter of the product along T, under it
    backward  none: an operator without a gradient
    gradient  none; `gathered_linear` and `scattered_linear` say whose they are
    """
    factor = weight.T if transpose else weight
    tp = Axis("tp", size, rank, group_of(group))
    return _matmul_scatter(x, factor, Ring(tp, device=x.device, nbytes=_passed_on(x, factor, size)))


@torch.library.custom_op("pentode::matmul_scatter_gather", mutates_args=())
def matmul_scatter_gather(
    grad: Tensor, weight: Tensor, x: Tensor, group: str, size: int, rank: int
) -> tuple[Tensor, Tensor]:
    """`matmul_scatter` of grad and weight, and all ranks' x, in one pass.

        grad    [T, F]; x [T/tp, D]
        result  [T/tp, D], and all of x [T, D]
        weight  [F, D] of [F tp, D]

    group     that of the name, of `size` ranks
    forward   all-gather of x along T, then reduce-scatter of the product along T, both under it
    backward  none: an operator without a gradient
    gradient  none; `gathered_linear` says whose they are
    """
    tp = Axis("tp", size, rank, group_of(group))
    ring = Ring(tp, device=x.device, nbytes=x.nbytes + _passed_on(grad, weight, size))
    whole = x.new_empty(size, *x.shape)
    arriving = _start_gather(ring, x, whole)
    whole[rank] = x
    grad_x = _matmul_scatter(grad, weight, ring)
    for _, part in arriving:
        part.wait()
    return grad_x, whole.flatten(0, 1)


@torch.library.custom_op("pentode::matmuls_under_sum", mutates_args=())
def matmuls_under_sum(
    grad: Tensor, weight: Tensor, x: Tensor, group: str, size: int, rank: int
) -> tuple[Tensor, Tensor]:
    """The gradients of x, summed over the ranks, and of weight, from that of x W^T.

        grad    [T, F]; x [T, D]
        result  [T, D] and [F, D]
        weight  [F, D] of [F tp, D]

    group     that of the name, of `size` ranks
    forward   all-reduce of x's gradient, under the product for the weight's
    backward  none: an operator without a gradient
    gradient  none; `replicated_linear` says whose they are
    """
    grad_x = grad @ weight
    work = start_sum_(grad_x, Axis("tp", size, rank, group_of(group)))
    grad_weight = grad.T @ x
    if work is not None:
        work.wait()
    return grad_x, grad_weight


OPERATORS = (
    torch.ops.pentode.gather_matmul.default,
    torch.ops.pentode.matmul_scatter.default,
)


@gather_matmul.register_fake
def _(
    x: Tensor, weight: Tensor, transpose: bool, keep: bool, group: str, size: int, rank: int
) -> tuple[Tensor, Tensor]:
    tokens, d_out = size * x.shape[0], weight.shape[0 if transpose else 1]
    return x.new_empty(tokens, d_out), x.new_empty(tokens if keep else 0, x.shape[1])


@matmul_scatter.register_fake
def _(x: Tensor, weight: Tensor, transpose: bool, group: str, size: int, rank: int) -> Tensor:
    return x.new_empty(x.shape[0] // size, weight.shape[0 if transpose else 1])


@matmul_scatter_gather.register_fake
def _(grad: Tensor, weight: Tensor, x: Tensor, group: str, size: int, rank: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(size * x.shape[0], x.shape[1])


@matmuls_under_sum.register_fake
def _(grad: Tensor, weight: Tensor, x: Tensor, group: str, size: int, rank: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _address(tp: Axis) -> tuple[str, int, int]:
    """How an operator is told of an axis: only plain values can be."""
    assert tp.group is not None, f"axis {tp.name} has size {tp.size} and no group"
    return tp.group.group_name, tp.size, tp.rank


def _start_gather(ring: Ring, x: Tensor, whole: Tensor) -> list[tuple[int, Receipt]]:
    """Begin to fill the other ranks' parts of `whole` [tp, t, K]; their numbers, in the order of their coming."""
    rank, size = ring.axis.rank, ring.axis.size
    numbers = [(rank + hop) % size for hop in range(1, size)]
    return [(number, ring.start(x, hop=rank - number, into=whole[number])) for number in numbers]


def _matmul_scatter(x: Tensor, factor: Tensor, ring: Ring) -> Tensor:
    """Multiply the others' tokens first, and pass each part on while the next is multiplied."""
    rank, size = ring.axis.rank, ring.axis.size
    parts = x.view(size, -1, x.shape[1])
    arriving = []
    for hop in range(1, size):
        made = ring.room(parts.shape[1], factor.shape[1], dtype=x.dtype)
        torch.mm(parts[(rank + hop) % size], factor, out=made)
        arriving.append(ring.start(made, hop=hop, into=torch.empty_like(made)))
    total = parts[rank] @ factor
    for part in arriving:
        total += part.wait()[0]
    return total


def _passed_on(x: Tensor, factor: Tensor, size: int) -> int:
    """Bytes of the product [T, D] that belong to other ranks."""
    return x.shape[0] // size * (size - 1) * factor.shape[1] * x.itemsize
