"""Products with what follows them in the same kernel, by the package quack-kernels, where it is installed.

SwiGLU and its backward are done on what a product has just made, and a weight's gradient is added to the sum of the
micro-batches where it is made: none of that is written to memory to be read again. So is a cross-entropy's gradient
made of logits that are read once. On Hopper, for bfloat16 and large operands; elsewhere torch multiplies, and kernels
of ours do the rest (docs/performance.md).

T tokens, K input and N output features, F features of a feed-forward layer. "In turn" are gate 0, up 0, gate 1, up 1...
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pentode import device as devices
from pentode.ops.gradient_sum import GradientSum, sum_of
from pentode.ops.kernel_package import KernelPackage

GENERATION = 9  # of NVIDIA's GPUs: the tiles below were chosen on Hopper
LARGE = 1e11  # multiplications of a product from which it is done so: its launch takes the host longer than torch's
MULTIPLE = 8  # of numbers in a row, which are then 16 bytes
FORWARD = (128, 192, 2, 1, True)  # rows, columns of a tile; of a cluster, in tiles; whether one ends as another begins
BACKWARD = (128, 192, 2, 1, True)
BACKWARD_OF_NARROW = (128, 128, 1, 2, True)  # where SwiGLU again and the rest take longer than so short a product
NARROW = 4096  # input features below which a product is short
TILES = ((256, 128, 1, 2, False), (256, 192, 2, 1, False))  # of products that nothing follows
LONG = 65536  # entries of a vocabulary: a row does not stay in the cache until a kernel of ours needs it again
LONGEST = 131072  # what the largest group of multiprocessors holds that was tried, of 8
_LEFT_OUT = ContextVar("left_out", default=False)


class Functions(NamedTuple):
    """The package's.

    gated           (A, B, ...) -> A B, and SwiGLU of it
    gated_backward  (A, B, PreAct, ...) -> SwiGLU's gradient, of A B, and SwiGLU, of what it was applied to
    gated_gradient  (A, B, PreAct, out={"D": ...}, ...): the first of these alone
    product         (A, B, out, C=None, ...): alpha A B is written to `out`, or added to it; or A B + C is written
    tiles           (rows, columns, rows, columns, one ends as another begins) -> how a product is to be cut
    cross_entropy   (logits, labels, logit of the label, loss, log_total, gradient, weights, what is no label)
    """

    gated: Callable[..., tuple[Tensor, Tensor]]
    gated_backward: Callable[..., tuple[Tensor, Tensor]]
    gated_gradient: Callable[..., object]
    product: Callable[..., object]
    tiles: Callable[..., Any]
    cross_entropy: Callable[..., None]


def _functions() -> Functions:
    """They take what they are given here, or this raises."""
    from quack.cross_entropy import cross_entropy_fwd_out  # pyright: ignore[reportMissingImports]
    from quack.gemm_config import GemmConfig  # pyright: ignore[reportMissingImports]
    from quack.gemm_interface import gemm_act, gemm_dact, gemm_tuned  # pyright: ignore[reportMissingImports]

    from pentode.ops.fused_epilogue import swiglu_gradient

    def tiles(rows: int, columns: int, cluster_rows: int, cluster_columns: int, overlapping: bool) -> Any:
        return GemmConfig(
            tile_m=rows,
            tile_n=columns,
            cluster_m=cluster_rows,
            cluster_n=cluster_columns,
            pingpong=overlapping,
            is_dynamic_persistent=False,
            device_capacity=GENERATION,
        )

    found = Functions(gemm_act, gemm_dact, swiglu_gradient, gemm_tuned.fn, tiles, cross_entropy_fwd_out)
    tiles(*FORWARD)
    asked = dict.fromkeys(("activation", "tuned", "config"))
    inspect.signature(found.gated).bind(0, 0, concat_layout=0, **asked)
    inspect.signature(found.gated_backward).bind(0, 0, 0, dynamic_scheduler=0, **asked)
    inspect.signature(found.gated_gradient).bind(0, 0, 0, out={}, tuned=0, config=0, dynamic_scheduler=0)
    inspect.signature(found.cross_entropy).bind(0, 0, 0, 0, 0, 0, 0, 0)
    inspect.signature(found.product).bind(0, 0, 0, C=0, alpha=0, config=0, add_to_output=0, concat_layout=0)
    return found


PACKAGE = KernelPackage(
    "quack-kernels",
    generations=(GENERATION,),
    functions=_functions,
    does="Products that compute SwiGLU and add up gradients",
    instead="torch multiplies",
)


@contextmanager
def left_out() -> Iterator[None]:
    """Have torch multiply, in this thread."""
    before = _LEFT_OUT.set(True)
    try:
        yield
    finally:
        _LEFT_OUT.reset(before)


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether x [T, K] and weight [N, K] are for the package. What torch compiles is not.

    Of a linear layer it then makes the weight's gradient, of a feed-forward layer (`feed_forward.py`) everything.
    """
    if not devices.runs_kernels(x) or _LEFT_OUT.get() or x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return False
    (T, K), N = x.shape, weight.shape[0]
    return T * K * N >= LARGE and not any(size % MULTIPLE for size in (T, K, N)) and PACKAGE.is_usable(x.device)


def sum_for(x: Tensor, weight: Tensor) -> GradientSum | None:
    """The sum that backward is to add this weight's gradient to; None where it has none, or torch makes it."""
    found = sum_of(weight)
    return found if found is not None and serves(x, weight) else None


def swiglu(x: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """gate and up in turn, [T, 2F], of x [T, K] and gate_up [2F, K]; and silu(gate) * up, [T, F]."""
    of = PACKAGE.on(x.device)
    return of.gated(x, gate_up.t(), activation="swiglu", tuned=False, config=of.tiles(*FORWARD), concat_layout=("B",))


def linear_onto(stream: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """stream [T, N] + x [T, K] weight [N, K]^T, rounded once."""
    found = torch.empty_like(stream)
    _product(x, weight.t(), found, C=stream)
    return found


def swiglu_backward(grad: Tensor, down: Tensor, in_turn: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of gate and up in turn, [T, 2F], from that of down(silu(gate) * up), [T, K], down [K, F].

    And silu(gate) * up once more, [T, F].
    """
    of = PACKAGE.on(grad.device)
    tiles = of.tiles(*(BACKWARD if grad.shape[1] >= NARROW else BACKWARD_OF_NARROW))
    return of.gated_backward(
        grad, down, in_turn, activation="swiglu", tuned=False, config=tiles, dynamic_scheduler=False
    )


def swiglu_gradient(grad: Tensor, down: Tensor, in_turn: Tensor) -> Tensor:
    """The first of these alone, where silu(gate) * up was kept."""
    of, found = PACKAGE.on(grad.device), torch.empty_like(in_turn)
    tiles = of.tiles(*BACKWARD)
    of.gated_gradient(grad, down, in_turn, out={"D": found}, tuned=False, config=tiles, dynamic_scheduler=False)
    return found


def swiglu_input_gradient(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of x [T, K], from that of gate and up in turn [T, 2F], with gate_up [2F, K]."""
    found = grad.new_empty(grad.shape[0], gate_up.shape[1])
    _product(grad, gate_up, found, concat_layout=("B",))
    return found


def weight_gradient(grad: Tensor, x: Tensor, found: GradientSum | None, *, in_turn: bool = False) -> Tensor | None:
    """The gradient of a weight [N, K], of grad [T, N] and x [T, K]: added to its sum, or where it has none given back.

    `in_turn` are the columns of grad, for a weight whose rows are gate's before up's.
    """
    halves = {"concat_layout": ("out",)} if in_turn else {}
    if found is not None:
        _product(grad.t(), x, found.total, add_to_output=found.begin(), **halves)
        return None
    gradient = x.new_empty(grad.shape[1], x.shape[1])
    _product(grad.t(), x, gradient, **halves)
    return gradient


def add_weight_gradient(grad: Tensor, x: Tensor, found: GradientSum, scale: Tensor) -> None:
    """Add the gradient of a weight [N, K], of grad [T, N] and x [T, K], to its sum, times `scale`, 0-d float32."""
    _product(grad.t(), x, found.total, add_to_output=found.begin(), alpha=scale.view(1))


def serves_loss(logits: Tensor) -> bool:
    """Whether `cross_entropy_` is to go over logits [n, V]: where the package is there for products."""
    if not devices.runs_kernels(logits) or _LEFT_OUT.get() or logits.dtype != torch.bfloat16:
        return False
    V = logits.shape[1]
    return LONG <= V <= LONGEST and V % MULTIPLE == 0 and PACKAGE.is_loaded(logits.device)


def cross_entropy_(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    """The log of each row's total [n], float32; in place, logits [n, V] become its gradient, less 1 at the label.

    Rows whose label [n] is `ignore` become zero, where they are finite.
    """
    log_total, loss = logits.new_empty(2, logits.shape[0], dtype=torch.float32)
    PACKAGE.on(logits.device).cross_entropy(logits, labels, None, loss, log_total, logits, None, ignore)
    return log_total


def _product(a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
    of, (rows, columns) = PACKAGE.on(a.device), out.shape
    of.product(a, b, out, config=of.tiles(*_best(rows, columns, devices.multiprocessors(a.device))), **options)


def _best(rows: int, columns: int, multiprocessors: int) -> tuple[int, int, int, int, bool]:
    """The tiles by which a result is made soonest: all multiprocessors make one of them at a time, in so many turns."""

    def time(tile: tuple[int, int, int, int, bool]) -> int:
        high, wide, *_ = tile
        tiles = -(-rows // high) * -(-columns // wide)
        return -(-tiles // multiprocessors) * high * wide

    return min(TILES, key=time)
