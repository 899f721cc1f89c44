"""Layers cut over the tensor-parallel axis, after Megatron-LM (arXiv:1909.08053, and arXiv:2205.05198 for sequences).

T tokens of the micro-batch. Under sequence parallelism the activations between these layers are cut along T, [T/tp, D],
and each layer joins or cuts them itself; the docstrings give the plain form first, that form after a bar.
"""

# An autograd Function gives its context attributes and its backward a signature that torch's stubs do not know.
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from pentode.dist import collectives
from pentode.dist.mesh import Axis
from pentode.ops.activation import gated
from pentode.ops.embedding import embedding
from pentode.ops.linear import Float8, gated_linear, linear
from pentode.parallel import tensor_overlap
from pentode.parallel.spec import Cut, Init, ParamSpec, parameter


@dataclass
class Place:
    """Where a stage's layers keep their weights: cut over which axis, on which device, in which dtype.

    tp_kv         the neighbouring tp ranks that hold one key/value head together, where there are fewer than tp
    gather_again  under sequence parallelism, layers keep their input's shard and gather it again in backward
    overlap       layers communicate while they multiply
    float8        how layers scale what they multiply in float8; None: they multiply in `dtype`
    activation_again  feed-forward layers keep what their activation is computed of, and compute it again in backward
    """

    tp: Axis
    device: torch.device
    dtype: torch.dtype
    tp_kv: Axis = field(default_factory=lambda: Axis("tp_kv"))
    sequence_parallel: bool = False
    gather_again: bool = False
    overlap: bool = False
    float8: Float8 | None = None
    activation_again: bool = False

    def parameter(
        self, *shape: int, cut: Cut | None = None, init: Init = "normal", shared_with: Axis | None = None
    ) -> nn.Parameter:
        """A parameter of this global shape, cut over tp and used on all tokens: its gradient is complete.

        But for pieces with copies, and for what the ranks of an axis `shared_with` each hold and use in another place:
        there it is a partial sum.
        """
        spec = ParamSpec(shape, cut, copies=shared_with, sum_over=shared_with, init=init)
        return parameter(spec, device=self.device, dtype=self.dtype)

    def replicated(self, *shape: int, init: Init = "normal") -> nn.Parameter:
        """A parameter that every rank of tp holds whole and uses between the cut layers.

        There, under sequence parallelism, each rank sees 1/tp of the tokens: its gradient is a partial sum over tp.
        """
        spec = ParamSpec(shape, copies=self.tp, sum_over=self.tp if self.sequence_parallel else None, init=init)
        return parameter(spec, device=self.device, dtype=self.dtype)

    @contextmanager
    def without_sequence_parallelism(self) -> Iterator[None]:
        """For a while, activations are whole everywhere: the one token that generation reads cannot be cut."""
        before, self.sequence_parallel = self.sequence_parallel, False
        try:
            yield
        finally:
            self.sequence_parallel = before

    def enter(self, x: Tensor) -> Tensor:
        """All tokens [T, D], from activations between cut layers, for a layer whose outputs are cut.

        group     tp
        forward   nothing                   | all-gather of x along T
        backward  all-reduce of x's grad    | reduce-scatter of x's grad along T
        gradient  of x: complete
        """
        return collectives.all_gather(x, self.tp) if self.sequence_parallel else collectives.replicate(x, self.tp)

    def leave(self, y: Tensor) -> Tensor:
        """Activations between cut layers, from the ranks' partial sums [T, D].

        group     tp
        forward   all-reduce of y           | reduce-scatter of y along T
        backward  nothing                   | all-gather of y's grad along T
        gradient  of y: complete
        """
        return collectives.reduce_scatter(y, self.tp) if self.sequence_parallel else collectives.all_reduce(y, self.tp)

    def local_tokens(self, x: Tensor) -> Tensor:
        """The rows of x [T, ...] whose tokens this rank holds between cut layers: all | its [T/tp, ...]."""
        return x.chunk(self.tp.size)[self.tp.rank] if self.sequence_parallel else x


class ColumnLinear(nn.Module):
    """y = x W^T + b, with W's rows (output features) cut over tp, each piece of them by itself.

        x       [T, d_in], or [T/tp, d_in] under sequence parallelism
        y       [T, d_out/tp], the local parts of the pieces one after another
        weight  [d_out/tp, d_in] of [d_out, d_in]; bias [d_out/tp] of [d_out]

        group     tp
        forward   nothing                  | all-gather of x along T
        backward  all-reduce of x's grad   | reduce-scatter of x's grad along T
        gradient  of x: complete; of weight and bias: complete for the part held here, but of pieces with copies:
                  partial over those, summed by the step
    Keeps all of x for backward; under sequence parallelism with `Place.gather_again` only its [T/tp, d_in], which is
    gathered once more in backward. With `Place.overlap` the messages go on under the products (`tensor_overlap.py`).
    """

    def __init__(
        self,
        d_in: int,
        pieces: tuple[int, ...],
        *,
        place: Place,
        bias: bool = False,
        copies: tuple[Axis | None, ...] = (),
    ) -> None:
        """`copies` has, for each piece that is cut into fewer parts than tp, the ranks that hold one part alike."""
        super().__init__()
        self.place = place
        cut, d_out = Cut(0, place.tp, pieces, copies), sum(pieces)
        self.weight = place.parameter(d_out, d_in, cut=cut)
        self.bias = place.parameter(d_out, cut=cut, init="zeros") if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.place.tp.size == 1:
            return linear(x, self.weight, self.bias, float8=self.place.float8)
        y = self._product(x)
        return y if self.bias is None else y + self.bias

    def gated(self, x: Tensor, activation: str) -> Tensor:
        """activation(gate) * up, where the outputs are two pieces, [gate, up], without a bias.  # [T, F/tp]"""
        assert self.bias is None, "a gated layer has no bias"
        if self.place.float8 is not None:
            return gated_linear(self.place.enter(x), self.weight, activation, float8=self.place.float8)
        return gated(self(x), activation)

    def _product(self, x: Tensor) -> Tensor:
        place, weight = self.place, self.weight
        if place.overlap and place.sequence_parallel:
            return tensor_overlap.gathered_linear(x, weight, place.tp, gather_again=place.gather_again)
        if place.overlap:
            return tensor_overlap.replicated_linear(x, weight, place.tp)
        if place.sequence_parallel and place.gather_again:
            return _GatheringLinear.apply(x, weight, place.tp)
        return linear(place.enter(x), weight, float8=place.float8)


class _GatheringLinear(torch.autograd.Function):
    """x W^T of all tokens, of which only this rank's [T/tp, D] are kept.

    forward: all-gather; backward: all-gather again, and reduce-scatter.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        ctx.save_for_backward(x, weight)
        return collectives.gather(x, tp) @ weight.T

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        whole = collectives.gather_again(x, ctx.tp, after=grad)
        return collectives.sum_and_split(grad @ weight, ctx.tp), grad.T @ whole, None


class RowLinear(nn.Module):
    """y = x W^T + b, with W's columns (input features) cut over tp.

        x       [T, d_in/tp]
        y       [T, d_out], or [T/tp, d_out] under sequence parallelism
        weight  [d_out, d_in/tp] of [d_out, d_in]; bias [d_out], whole

        group     tp
        forward   all-reduce of y          | reduce-scatter of y along T
        backward  nothing                  | all-gather of y's grad along T
        gradient  of x: complete; of weight: complete for the part held here;
                  of bias: complete        | partial over tp, summed by the step (sum_over=tp)
    Keeps x for backward. With `Place.overlap` under sequence parallelism the messages go on under the products.
    """

    def __init__(self, d_in: int, d_out: int, *, place: Place, bias: bool = False) -> None:
        super().__init__()
        self.place = place
        self.weight = place.parameter(d_out, d_in, cut=Cut(1, place.tp, (d_in,)), init="residual")
        self.bias = place.replicated(d_out, init="zeros") if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.place.tp.size == 1:
            # One kernel, instead of a second pass for the bias.
            return linear(x, self.weight, self.bias, float8=self.place.float8)
        y = self._product(x)
        return y if self.bias is None else y + self.bias

    def _product(self, x: Tensor) -> Tensor:
        if self.place.overlap and self.place.sequence_parallel:
            return tensor_overlap.scattered_linear(x, self.weight, self.place.tp)
        return self.place.leave(linear(x, self.weight, float8=self.place.float8))


class VocabTable(nn.Module):
    """A table of one row a vocabulary entry, cut over tp: [padded/tp, d] of [vocab_size, d].

    The rows are padded at their end, to a multiple of tp and of what suits the hardware; padding is zero, counts
    nowhere and is never saved. An output layer is just such a table: `vocab_loss` and `vocab_logits` multiply by it.

    A table that serves as embedding on one pipeline stage and as output layer on another is held by both ranks of the
    axis `shared_with`: each one's gradient is a partial sum over the two, which the step adds up.
    """

    def __init__(self, vocab_size: int, d: int, *, padded: int, place: Place, shared_with: Axis | None = None) -> None:
        super().__init__()
        if padded < vocab_size:
            raise ValueError(f"VocabTable: padded to {padded} rows, fewer than the vocabulary's {vocab_size}")
        self.place = place
        self.weight = place.parameter(vocab_size, d, cut=Cut(0, place.tp, (padded,)), shared_with=shared_with)
        rows = self.weight.shape[0]
        held = min(max(vocab_size - place.tp.rank * rows, 0), rows)
        self.weight.data[held:].zero_()  # neither initialisation nor a checkpoint fills what belongs to nobody


class VocabEmbedding(VocabTable):
    """The rows of the table that the tokens name, with the vocabulary cut over tp.

    tokens  [T] int64
    y       [T, d], or [T/tp, d] under sequence parallelism
    weight  [padded/tp, d] of [vocab_size, d]

    group     tp
    forward   all-reduce of y          | reduce-scatter of y along T
    backward  nothing                  | all-gather of y's grad along T
    gradient  of weight: complete for the rows held here; of a table `shared_with` others: partial over those
    """

    def forward(self, tokens: Tensor) -> Tensor:
        if self.place.tp.size == 1:
            return embedding(tokens, self.weight)  # no token is elsewhere, so none need be masked
        rows = tokens - self.place.tp.rank * self.weight.shape[0]
        here = (rows >= 0) & (rows < self.weight.shape[0])
        y = embedding(rows.where(here, 0), self.weight) * here[:, None]
        return self.place.leave(y)
