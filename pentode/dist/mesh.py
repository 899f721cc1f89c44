"""The grid of processes: one named axis for each way of cutting work up, and who talks to whom on it."""

from dataclasses import dataclass, field
from math import prod

import torch
import torch.distributed as dist

ORDER = ("pp", "dp", "cp", "tp")  # outermost first: tp ranks are neighbours, on the fastest links


@dataclass(frozen=True)
class Axis:
    """One axis as this process sees it: its size, this process's place on it, and its process group.

    An axis of size 1 has no group, and every collective on it is the identity.
    """

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Mesh:
    """The axes of the grid, and two products of them.

    data   dp x cp: gradients and token counts are summed over it
    model  pp x tp: together its ranks hold one copy of the model
    """

    pp: Axis
    dp: Axis
    cp: Axis
    tp: Axis
    data: Axis
    model: Axis

    @classmethod
    def single(cls) -> "Mesh":
        """The mesh of one process; needs no process group."""
        return cls(*(Axis(name) for name in (*ORDER, "data", "model")))

    @classmethod
    def build(cls, *, pp: int = 1, dp: int = 1, cp: int = 1, tp: int = 1) -> "Mesh":
        """Cut the world into axes; every rank must call, in the same order. Without a world there is one rank."""
        sizes = dict(zip(ORDER, (pp, dp, cp, tp), strict=True))
        world = dist.get_world_size() if dist.is_initialized() else 1
        if prod(sizes.values()) != world:
            product = " x ".join(f"{name}={size}" for name, size in sizes.items())
            raise ValueError(f"parallelism: {product} = {prod(sizes.values())} ranks, but WORLD_SIZE is {world}")
        grid = torch.arange(world).view(*sizes.values())
        axes = {name: _axis(name, grid, along=(name,)) for name in ORDER}
        return cls(**axes, data=_axis("data", grid, along=("dp", "cp")), model=_axis("model", grid, along=("pp", "tp")))


def _axis(name: str, grid: torch.Tensor, *, along: tuple[str, ...]) -> Axis:
    """The axis whose ranks differ only in their places `along` these axes of the grid."""
    dims = [ORDER.index(part) for part in along]
    size = prod(grid.shape[dim] for dim in dims)
    if size == 1:
        return Axis(name)
    lines = grid.movedim(dims, list(range(-len(dims), 0))).reshape(-1, size).tolist()
    this = next(line for line in lines if dist.get_rank() in line)
    group, _ = dist.new_subgroups_by_enumeration(lines)
    assert isinstance(group, dist.ProcessGroup), f"this rank is on no line of axis {name}"
    return Axis(name, size, this.index(dist.get_rank()), group)
