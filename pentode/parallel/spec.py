"""What a parameter is, globally: its whole shape, which part of it this rank holds, and what its gradient lacks.

From a ParamSpec follow initialisation, checkpoints, parameter counts and exchange with other libraries, whatever the
layout. Global shapes count the true vocabulary: padding exists only in the local tensor and belongs to nobody.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pentode.dist.mesh import Axis

Init = Literal["normal", "residual", "ones", "zeros"]


@dataclass(frozen=True)
class Cut:
    """`dim` is cut over `axis` piece by piece: of pieces (q, k, v) each rank holds a part of q, then of k and of v.

    The pieces' sizes add up to the global size along dim, or to more where that is padded at its end. A piece may be in
    fewer parts than there are ranks (key/value heads fewer than tp): `copies` has its axis of neighbouring ranks
    that hold the same part, and None for the other pieces; empty means None for all.
    """

    dim: int
    axis: Axis
    pieces: tuple[int, ...]
    copies: tuple[Axis | None, ...] = ()

    def __post_init__(self) -> None:
        for piece, copies in self.parts():
            parts = self.axis.size // copies.size
            if piece % parts:
                raise ValueError(f"Cut: {self.axis.name}={self.axis.size} does not divide a piece of {piece}")

    def parts(self) -> list[tuple[int, Axis]]:
        """Each piece's global size, and the ranks that hold one part of it alike."""
        copies = self.copies or (None,) * len(self.pieces)
        return [(piece, axis or Axis("none")) for piece, axis in zip(self.pieces, copies, strict=True)]

    def local_size(self) -> int:
        """The size of this rank's tensor along dim, padding included."""
        return sum(piece * copies.size // self.axis.size for piece, copies in self.parts())


@dataclass(frozen=True)
class Box:
    """A block of the global tensor that one block of the local tensor holds: where it starts in each, and its shape."""

    global_start: tuple[int, ...]
    local_start: tuple[int, ...]
    shape: tuple[int, ...]

    def of_global(self, whole: Tensor) -> Tensor:
        """The view of the global tensor that is this box."""
        return _block(whole, self.global_start, self.shape)

    def of_local(self, part: Tensor) -> Tensor:
        """The view of the local tensor that is this box."""
        return _block(part, self.local_start, self.shape)


@dataclass(frozen=True)
class ParamSpec:
    """A parameter's global shape, its cut (None: not cut), who else holds the same, and how it starts.

    copies    the axis whose ranks hold this local tensor alike: tp for what is not cut over it, `ends` for an embedding
              that first and last stage share; None where nobody does
    sum_over  the axis over which this rank's gradient is a partial sum that the step must still add up; None where the
              gradient is complete for the part held here. Of pieces with copies it is always partial, over those
    init      "residual" is a projection back into the residual stream, drawn narrower than "normal"
    """

    global_shape: tuple[int, ...]
    cut: Cut | None = None
    copies: Axis | None = None
    sum_over: Axis | None = None
    init: Init = "normal"

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's tensor, padding included."""
        if self.cut is None:
            return self.global_shape
        return _replace(self.global_shape, self.cut.dim, self.cut.local_size())

    def boxes(self) -> list[Box]:
        """Which boxes of the global tensor this rank holds, in local order; they cover the local tensor but padding."""
        return [box for box, _ in self._held()]

    def owned(self) -> list[Box]:
        """The boxes that this rank counts, saves and sums as its own.

        Of all ranks that hold one copy of the model together, each element of the global tensor has exactly one owner:
        the first of those that hold it.
        """
        if self.copies is not None and self.copies.rank > 0:
            return []
        return [box for box, copies in self._held() if copies.rank == 0]

    def partial(self) -> list[tuple[Box, Axis]]:
        """The boxes whose gradient is a partial sum, each with the axis over which it is one."""
        held = [(box, self.sum_over or copies) for box, copies in self._held()]
        return [(box, axis) for box, axis in held if axis.size > 1]

    def _held(self) -> list[tuple[Box, Axis]]:
        """This rank's boxes, each with the ranks that hold the same part of its piece."""
        origin = (0,) * len(self.global_shape)
        if self.cut is None:
            return [(Box(origin, origin, self.global_shape), Axis("none"))]
        dim, axis = self.cut.dim, self.cut.axis
        found, global_at, local_at = [], 0, 0
        for piece, copies in self.cut.parts():
            part = piece * copies.size // axis.size
            start = global_at + axis.rank // copies.size * part
            held = min(part, self.global_shape[dim] - start)  # less than part, or nothing, where padding begins
            if held > 0:
                shape = _replace(self.global_shape, dim, held)
                found.append((Box(_replace(origin, dim, start), _replace(origin, dim, local_at), shape), copies))
            global_at += piece
            local_at += part
        return found

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of a global tensor, its padding zero."""
        if tuple(whole.shape) != self.global_shape:
            raise ValueError(f"ParamSpec: a tensor of {list(whole.shape)} for a global {list(self.global_shape)}")
        part = whole.new_zeros(self.local_shape)
        for box in self.boxes():
            box.of_local(part).copy_(box.of_global(whole))
        return part

    def put(self, part: Tensor, *, into: Tensor) -> None:
        """Write this rank's part, without its padding, where it belongs in a global tensor."""
        for box in self.boxes():
            box.of_global(into).copy_(box.of_local(part))


def parameter(spec: ParamSpec, *, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter for this rank's part, which carries its spec as `.spec`."""
    param = nn.Parameter(torch.empty(spec.local_shape, device=device, dtype=dtype))
    param.spec = spec  # pyright: ignore[reportAttributeAccessIssue]
    return param


def specs_of(module: nn.Module) -> dict[str, ParamSpec]:
    """Each parameter's spec, by the name it has in the module."""
    return {name: param.spec for name, param in module.named_parameters()}  # pyright: ignore[reportAttributeAccessIssue]


def _replace(numbers: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*numbers[:dim], value, *numbers[dim + 1 :])


def _block(x: Tensor, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    for dim, (at, size) in enumerate(zip(start, shape, strict=True)):
        x = x.narrow(dim, at, size)
    return x
