"""The mesh of one process; test_tensor_parallel.py has meshes of two, this file the arithmetic of larger ones."""

import pytest
import torch
import torch.distributed as dist

from pentode.dist import collectives
from pentode.dist.mesh import Axis, Mesh, coordinates


def test_one_process_needs_no_group_and_every_collective_is_the_identity() -> None:
    mesh = Mesh.single()
    assert mesh == Mesh.build()
    assert all(axis.size == 1 and axis.group is None for axis in vars(mesh).values())
    x = torch.randn(3, 2, requires_grad=True)
    for move in (collectives.replicate, collectives.all_reduce, collectives.all_gather, collectives.reduce_scatter):
        assert move(x, mesh.tp) is x
    assert collectives.sum_(x, mesh.data) is x
    assert collectives.max_(x, mesh.data) is x
    assert collectives.start_sum_(x, mesh.data) is None
    assert torch.equal(collectives.all_max(x, mesh.tp), x)


@pytest.mark.parametrize("rank", range(16))
def test_tp_ranks_are_neighbours_and_each_axis_finds_its_line(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    lines_of: list[list[list[int]]] = []

    def subgroups(lines: list[list[int]]) -> tuple[dist.ProcessGroup, list[dist.ProcessGroup]]:
        lines_of.append(lines)
        return dist.ProcessGroup(rank, len(lines[0])), []

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 16)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", subgroups)
    mesh = Mesh.build(pp=2, dp=2, cp=2, tp=2, kv_copies=2)
    pp, dp, cp, tp = mesh.pp.rank, mesh.dp.rank, mesh.cp.rank, mesh.tp.rank
    assert rank == 8 * pp + 4 * dp + 2 * cp + tp
    assert (mesh.data.size, mesh.data.rank) == (4, 2 * dp + cp)
    assert (mesh.model.size, mesh.model.rank) == (4, 2 * pp + tp)
    assert (mesh.world.size, mesh.world.rank) == (16, rank)
    assert (mesh.ends.size, mesh.ends.rank) == (2, pp)
    assert (mesh.tp_kv.size, mesh.tp_kv.rank) == (2, tp)
    assert coordinates(rank, pp=2, dp=2, cp=2, tp=2) == {"pp": pp, "dp": dp, "cp": cp, "tp": tp}
    assert len(lines_of) == 9
    for lines in lines_of:
        assert sorted(r for line in lines for r in line) == list(range(16))


@pytest.mark.parametrize("rank", range(12))
def test_ends_and_copies_of_heads_are_shared_by_those_who_hold_them(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 12)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", lambda lines: (dist.ProcessGroup(0, 2), []))
    mesh = Mesh.build(pp=3, tp=4, kv_copies=2)
    assert (mesh.ends.size, mesh.ends.rank) == ((1, 0) if mesh.pp.rank == 1 else (2, mesh.pp.rank // 2))
    assert (mesh.tp_kv.size, mesh.tp_kv.rank) == (2, mesh.tp.rank % 2)
    with pytest.raises(ValueError, match="3 copies of each key/value head do not divide tp=4"):
        Mesh.build(pp=3, tp=4, kv_copies=3)


def test_axes_are_equal_by_name_size_and_rank() -> None:
    assert Axis("tp", 2, 1) == Axis("tp", 2, 1)
    assert Axis("tp", 2, 1) != Axis("tp", 2, 0)


def test_a_world_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="pp=1 x dp=2 x cp=1 x tp=4 = 8 ranks, but WORLD_SIZE is 1"):
        Mesh.build(dp=2, tp=4)
