"""The collectives: a few differentiable ones, which are the whole vocabulary of the layers, and a few plain ones.

Written as autograd Functions over the functional collectives with an explicit wait, the form that torch.compile traces
in one graph and that selective checkpointing does not break (in-place calls give silently wrong gradients there).
An axis of size 1 makes each of them the identity.
"""
# An autograd Function gives its context attributes and its backward a signature that torch's stubs do not know.
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

import secrets
import threading
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed.distributed_c10d import _resolve_process_group

from pentode.dist.board import Board
from pentode.dist.mesh import Axis

T = TypeVar("T")

_ops = torch.ops._c10d_functional
SUMS = (_ops.all_reduce.default, _ops.reduce_scatter_tensor.default)  # what recomputation should rather not send again
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # torch 2.13 renamed both
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def replicate(x: Tensor, axis: Axis) -> Tensor:
    """Use a tensor that all ranks of the axis hold alike in work that differs between them.

    x, y  of any shape, alike on all ranks

    group     axis
    forward   nothing
    backward  all-reduce (sum) of y's gradient
    gradient  of x: complete
    """
    return x if axis.size == 1 else _Replicate.apply(x, _name(axis))


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum the ranks' partial results; all of them get the sum.

    x  of any shape, each rank's own; y of x's shape, alike on all ranks

    group     axis
    forward   all-reduce (sum) of x
    backward  nothing: the sum is used alike by all ranks, so its gradient is already complete
    gradient  of x: complete
    """
    return x if axis.size == 1 else _AllReduce.apply(x, _name(axis))


def all_gather(x: Tensor, axis: Axis, *, dim: int = 0) -> Tensor:
    """Join the ranks' shards along dim.

    x  of any shape, each rank's own; y has axis.size times as much along dim, alike on all ranks

    group     axis
    forward   all-gather of x along dim
    backward  reduce-scatter (sum) of y's gradient along dim
    gradient  of x: complete, if each rank holds its own part of the sum that is y's
    """
    return x if axis.size == 1 else _AllGather.apply(x, _name(axis), axis.size, dim)


def reduce_scatter(x: Tensor, axis: Axis, *, dim: int = 0) -> Tensor:
    """Sum the ranks' partial results; each rank keeps its shard along dim, whose size the axis must divide.

    x  of any shape, each rank's own; y has 1/axis.size of it along dim, each rank its own

    group     axis
    forward   reduce-scatter (sum) of x along dim
    backward  all-gather of y's gradient along dim
    gradient  of x: complete
    """
    if axis.size == 1:
        return x
    if x.shape[dim] % axis.size:
        raise ValueError(f"reduce_scatter: {axis.name}={axis.size} does not divide dim {dim} of {list(x.shape)}")
    return _ReduceScatter.apply(x, _name(axis), axis.size, dim)


def gather(x: Tensor, axis: Axis) -> Tensor:
    """Join the ranks' shards along dim 0, outside autograd (forward only, no backward)."""
    return x if axis.size == 1 else _join(x, _name(axis), axis.size, 0)


def gather_again(x: Tensor, axis: Axis, *, after: Tensor) -> Tensor:
    """`gather` once more, in backward, of what was not kept (forward only, no backward).

    `after` is the gradient at hand. Compiled code would otherwise find that it has gathered this x before, and keep it.
    """
    return x if axis.size == 1 else _gather_after(x, after, _name(axis), axis.size)


def sum_and_split(x: Tensor, axis: Axis) -> Tensor:
    """Sum x over the ranks, each keeping its shard along dim 0; outside autograd (forward only, no backward)."""
    return x if axis.size == 1 else _sum_and_split(x, _name(axis), axis.size, 0)


def all_max(x: Tensor, axis: Axis) -> Tensor:
    """The elementwise maximum over the ranks, without a gradient.

    x  of any shape, each rank's own; y of x's shape, alike on all ranks

    group     axis
    forward   all-reduce (max) of x
    backward  none: the result is a constant
    """
    return x.detach() if axis.size == 1 else _reduce(x.detach(), _name(axis), "max")


def sum_(x: Tensor, axis: Axis) -> Tensor:
    """Sum x over the ranks in place. For counts and gradients, outside autograd (forward only, no backward)."""
    if axis.size > 1:
        dist.all_reduce(x, group=axis.group)
    return x


def start_sum_(x: Tensor, axis: Axis) -> dist.Work | None:
    """Begin `sum_` and return at once; x holds the sum after `.wait()`. None where there is nothing to wait for."""
    return dist.all_reduce(x, group=axis.group, async_op=True) if axis.size > 1 else None


def max_(x: Tensor, axis: Axis) -> Tensor:
    """The maximum of x over the ranks, in place, outside autograd (forward only, no backward)."""
    if axis.size > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=axis.group)
    return x


def start_sum_and_split_(x: Tensor, axis: Axis) -> dist.Work | None:
    """Begin to sum x [n] over the ranks, each keeping its own n / size elements of the sum, in place.

    Returns at once; after `.wait()` this rank's part of x holds the sum, and the rest is not to be read. Outside
    autograd (forward only, no backward). None where there is nothing to wait for.
    """
    if axis.size == 1:
        return None
    return _reduce_scatter(local_part(x, axis), x, group=axis.group, async_op=True)


def start_join_(x: Tensor, axis: Axis) -> dist.Work | None:
    """Begin to fill x [n] with every rank's own n / size elements of it, in place.

    Returns at once; after `.wait()` x is whole. Outside autograd (forward only, no backward). None where there is
    nothing to wait for.
    """
    if axis.size == 1:
        return None
    return _all_gather(x, local_part(x, axis), group=axis.group, async_op=True)


def local_part(x: Tensor, axis: Axis) -> Tensor:
    """This rank's share of x [n]: its n / size neighbouring elements, a view (forward and backward move nothing)."""
    return x.view(axis.size, -1)[axis.rank]


def broadcast_(x: Tensor, axis: Axis, *, source: int) -> Tensor:
    """Give all ranks of the axis the x of its rank `source`, in place (forward only, no backward)."""
    if axis.size > 1:
        dist.broadcast(x, group=axis.group, group_src=source)
    return x


def gather_objects(value: T, axis: Axis) -> list[T]:
    """Every rank's value, in the order of the axis; for small things as of JSON (forward only, no backward)."""
    if axis.size == 1:
        return [value]
    if axis.board is not None:
        return axis.board.gather(value)
    found: list[T | None] = [None] * axis.size
    dist.all_gather_object(found, value, group=axis.group)
    return found  # pyright: ignore[reportReturnType]


def beside(axis: Axis, cancelled: threading.Event) -> Axis:
    """The same ranks on a board of their own, for a thread beside this one; all of them must call.

    Whoever waits there for others stops waiting when `cancelled` is set.
    """
    if axis.size == 1:
        return Axis(axis.name)
    name = gather_objects(secrets.token_hex(8), axis)[0]
    return Axis(axis.name, axis.size, axis.rank, board=Board(name, axis.size, axis.rank, cancelled))


def wait_for_all() -> None:
    """Return when every process of the run has come here (forward only, no backward); at once where there is one."""
    if dist.is_initialized():
        dist.barrier()


class _Replicate(torch.autograd.Function):
    """forward: nothing; backward: all-reduce."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce(grad, ctx.group, "sum"), None


class _AllReduce(torch.autograd.Function):
    """forward: all-reduce; backward: nothing."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: str) -> Tensor:
        return _reduce(x, group, "sum")

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllGather(torch.autograd.Function):
    """forward: all-gather; backward: reduce-scatter."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: str, size: int, dim: int) -> Tensor:
        ctx.group, ctx.size, ctx.dim = group, size, dim
        return _join(x, group, size, dim)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum_and_split(grad, ctx.group, ctx.size, ctx.dim), None, None, None


class _ReduceScatter(torch.autograd.Function):
    """forward: reduce-scatter; backward: all-gather."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: str, size: int, dim: int) -> Tensor:
        ctx.group, ctx.size, ctx.dim = group, size, dim
        return _sum_and_split(x, group, size, dim)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _join(grad, ctx.group, ctx.size, ctx.dim), None, None, None


@torch.library.custom_op("pentode::gather_after", mutates_args=())
def _gather_after(x: Tensor, after: Tensor, group: str, size: int) -> Tensor:
    return _join(x, group, size, 0)


@_gather_after.register_fake
def _(x: Tensor, after: Tensor, group: str, size: int) -> Tensor:
    return x.new_empty(size * x.shape[0], *x.shape[1:])


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of this name, which is all that an operator can be told of one."""
    return _resolve_process_group(name)  # pyright: ignore[reportArgumentType]


def _name(axis: Axis) -> str:
    assert axis.group is not None, f"axis {axis.name} has size {axis.size} and no group"
    return axis.group.group_name


def _reduce(x: Tensor, group: str, operation: str) -> Tensor:
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), operation, group))


def _join(x: Tensor, group: str, size: int, dim: int) -> Tensor:
    rows = x.movedim(dim, 0).contiguous()
    return _ops.wait_tensor(_ops.all_gather_into_tensor(rows, size, group)).movedim(0, dim)


def _sum_and_split(x: Tensor, group: str, size: int, dim: int) -> Tensor:
    rows = x.movedim(dim, 0).contiguous()
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(rows, "sum", size, group)).movedim(0, dim)
