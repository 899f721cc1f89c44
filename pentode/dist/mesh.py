"""The grid of processes: one named axis for each way of cutting work up, and who talks to whom on it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import torch.distributed as dist

from pentode.dist.board import Board

ORDER = ("pp", "dp", "cp", "tp")  # outermost first: tp ranks are neighbours, on the fastest links


@dataclass(frozen=True)
class Axis:
    """One axis as this process sees it: its size, this process's place on it, and its process group.

    An axis of size 1 has no group, and every collective on it is the identity. One with a `board` instead of a group is
    for work beside the training's: objects are gathered by way of the board, from any thread, and nothing else can be.
    """

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    board: Board | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Mesh:
    """The axes of the grid, products of them, and two that only some ranks share.

    data   dp x cp: gradients are summed over it
    model  pp x tp: together its ranks hold one copy of the model
    world  all of them
    ends   the first and the last pipeline rank, which both hold a tied embedding; size 1 for those between
    tp_kv  neighbouring tp ranks that hold the same key/value head, where there are fewer heads than ranks; else size 1
    """

    pp: Axis
    dp: Axis
    cp: Axis
    tp: Axis
    data: Axis
    model: Axis
    world: Axis
    ends: Axis
    tp_kv: Axis

    @classmethod
    def single(cls) -> "Mesh":
        """The mesh of one process; needs no process group."""
        return cls(*(Axis(name) for name in (*ORDER, "data", "model", "world", "ends", "tp_kv")))

    @classmethod
    def build(cls, *, pp: int = 1, dp: int = 1, cp: int = 1, tp: int = 1, kv_copies: int = 1) -> "Mesh":
        """Cut the world into axes; every rank must call, in the same order. Without a world there is one rank.

        `kv_copies` neighbouring tp ranks hold each key/value head.
        """
        sizes = dict(zip(ORDER, (pp, dp, cp, tp), strict=True))
        world = dist.get_world_size() if dist.is_initialized() else 1
        if prod(sizes.values()) != world:
            product = " x ".join(f"{name}={size}" for name, size in sizes.items())
            raise ValueError(f"parallelism: {product} = {prod(sizes.values())} ranks, but WORLD_SIZE is {world}")
        if tp % kv_copies:
            raise ValueError(f"Mesh: {kv_copies} copies of each key/value head do not divide tp={tp}")
        grid = torch.arange(world).view(*sizes.values())
        pipelines = _lines(grid, along=("pp",))
        return cls(
            **{name: _axis(name, _lines(grid, along=(name,))) for name in ORDER},
            data=_axis("data", _lines(grid, along=("dp", "cp"))),
            model=_axis("model", _lines(grid, along=("pp", "tp"))),
            world=_axis("world", _lines(grid, along=ORDER)),
            ends=_axis("ends", [[line[0], line[-1]] for line in pipelines] if pp > 1 else []),
            tp_kv=_axis("tp_kv", grid.view(-1, kv_copies).tolist()),
        )


def everyone() -> Axis:
    """All processes there are, before they are cut into axes; alone, an axis of size 1."""
    if not dist.is_initialized():
        return Axis("world")
    return Axis("world", dist.get_world_size(), dist.get_rank(), dist.group.WORLD)


def coordinates(rank: int, *, pp: int, dp: int, cp: int, tp: int) -> dict[str, int]:
    """The place of a rank of the world on each axis of the grid, by the axis's name."""
    found: dict[str, int] = {}
    for name, size in zip(reversed(ORDER), (tp, cp, dp, pp), strict=True):
        rank, found[name] = divmod(rank, size)
    return {name: found[name] for name in ORDER}


def _lines(grid: torch.Tensor, *, along: Sequence[str]) -> list[list[int]]:
    """The sets of ranks that differ only in their places `along` these axes of the grid."""
    dims = [ORDER.index(name) for name in along]
    size = prod(grid.shape[dim] for dim in dims)
    return grid.movedim(dims, list(range(-len(dims), 0))).reshape(-1, size).tolist()


def _axis(name: str, lines: Sequence[Sequence[int]]) -> Axis:
    """The axis on which the ranks of each line stand together; a rank on no line stands alone."""
    if not lines or len(lines[0]) == 1:
        return Axis(name)
    group, _ = dist.new_subgroups_by_enumeration([list(line) for line in lines])
    line = next((line for line in lines if dist.get_rank() in line), None)
    if line is None:
        return Axis(name)
    assert isinstance(group, dist.ProcessGroup), f"this rank is on a line of axis {name}, but got no group"
    return Axis(name, len(line), line.index(dist.get_rank()), group)
