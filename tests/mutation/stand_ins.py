"""What a mutated package calls in place of a message or an axis; it is copied into that package.

Any of its modules may be the one that imports this, so nothing of it is imported here before it is called.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from pentode.dist.mesh import Axis, Mesh
    from pentode.dist.p2p import Form, Receipt
    from pentode.parallel.tensor import Place

_built: "list[tuple[ref[Mesh], int]]" = []  # the latest of this process, which it may end, and the world that it cuts

CROSSING = {"data": "tp", "dp": "tp"}  # the axis beside each; data's, where none is named
WIDER = {"tp": "model", "pp": "model", "ends": "pp", "tp_kv": "tp", "data": "world", "dp": "world", "model": "world"}


def watch(mesh: type["Mesh"], *, slow: bool) -> None:
    """Know the axes of this process from now on; with `slow`, messages are late once there are some."""
    build = mesh.build

    def recorded(**sizes: int) -> "Mesh":
        built = build(**sizes)
        if slow and not _built:
            from tests.mutation.trial import slow_down

            slow_down()
        _built[:] = [(ref(built), id(dist.group.WORLD))]
        return built

    mesh.build = recorded  # pyright: ignore[reportAttributeAccessIssue]


def crossing(axis: "Axis | None") -> "Axis | None":
    """An axis whose lines cross this one's: tp for data, data for all others."""
    return None if axis is None else _named(CROSSING.get(axis.name, "data"))


def wider(axis: "Axis | None") -> "Axis | None":
    """An axis of which this one is a part; of the world, the model's."""
    return None if axis is None else _named(WIDER.get(axis.name, "model"))


def alike(axis: "Axis") -> "Axis":
    """Another axis of the same size; this one, where there is none."""
    here = _members(axis)
    others = [_named(name) for name in ("data", "tp", "pp", "model", "ends")]
    return next((other for other in others if other.size == axis.size and _members(other) != here), axis)


def other_group(group: str) -> str:
    """The name of the group of another axis of the same size; this one, where there is none."""
    for axis in vars(_mesh()).values():
        if axis.group is not None and axis.group.group_name == group:
            other = alike(axis).group
            assert other is not None
            return other.group_name
    return group


def elsewhere(place: "Place") -> "Place":
    """The same place, on another axis."""
    axis = crossing(place.tp)
    assert axis is not None
    return replace(place, tp=axis)


def twice(start: Callable[..., object], *arguments: object, **options: object) -> object:
    """Do it, wait for it, and do it again: with what came, where something is passed on."""
    into = options.get("into")
    first = start(*arguments, **(options | {"into": torch.empty_like(into)} if isinstance(into, Tensor) else options))
    came = first.wait() if isinstance(first, dist.Work) or hasattr(first, "tensors") else None
    return start(*(came if isinstance(into, Tensor) else arguments), **options)


def stayed(x: Tensor, into: Tensor) -> "Receipt":
    """What comes of passing on to oneself."""
    from pentode.dist.p2p import Receipt

    return Receipt((into.copy_(x),), [])


def nothing_of(forms: "Sequence[Form]", device: torch.device) -> "Receipt":
    """Zeros, for which nobody need be waited."""
    from pentode.dist.p2p import Receipt

    return Receipt(tuple(torch.zeros(form.shape, dtype=form.dtype, device=device) for form in forms), [])


def unwaited(coming: object) -> object:
    """What is on its way, as it is now."""
    return getattr(coming, "tensors", None)


def _named(name: str) -> "Axis":
    """The axis of this name; one of this rank alone, where its world has not been cut into axes."""
    return getattr(_mesh(), name)


def _mesh() -> "Mesh":
    from pentode.dist.mesh import Mesh

    built = [mesh() for mesh, world in _built if world == id(dist.group.WORLD)]
    return (built[0] if built else None) or Mesh.single()


def _members(axis: "Axis") -> list[int]:
    return dist.get_process_group_ranks(axis.group) if axis.group is not None else []
