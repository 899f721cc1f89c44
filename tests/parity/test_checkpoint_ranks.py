"""Processes that save and read together over gloo: one checkpoint, whole or not at all."""

import errno
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pentode.checkpoint import storage
from pentode.checkpoint.folder import newest, open_checkpoint
from pentode.checkpoint.layout import Saved
from pentode.checkpoint.load import read_tensors
from pentode.checkpoint.save import save
from pentode.dist.mesh import Mesh
from pentode.errors import StorageError
from pentode.parallel.shards import pieces_of_range
from pentode.parallel.spec import ParamSpec
from tests.helpers.faulty_os import FaultyOs
from tests.helpers.layouts import Parameter, numbered
from tests.helpers.spawn import run_on_ranks

QKV = Parameter((12, 5), dim=0, heads=(4, 1, 1), width=2)
EMBED = Parameter((11, 5), dim=0)  # an odd vocabulary is padded
NAMES = ("embed", "qkv")


def spec_of(name: str, mesh: Mesh) -> ParamSpec:
    return {"embed": EMBED, "qkv": QKV}[name].spec(mesh.tp.size, mesh.tp.rank)


def own_range(spec: ParamSpec, mesh: Mesh) -> tuple[int, int]:
    """An uneven share of this rank's elements: those of one rank of `data`."""
    size = torch.Size(spec.local_shape).numel()
    edges = [0, *(size * (rank + 1) // mesh.data.size - 3 for rank in range(mesh.data.size - 1)), size]
    return edges[mesh.data.rank], edges[mesh.data.rank + 1]


def save_step(root: Path, step: int, mesh: Mesh) -> Path:
    """Weights by the first rank of `data`, moments by all in shares."""
    weights, moments = {}, {}
    for name in NAMES:
        spec = spec_of(name, mesh)
        local = spec.take(numbered(spec.global_shape)) * step
        weights[name] = Saved.of(local, spec.global_shape, spec.owned() if mesh.data.rank == 0 else [])
        start, stop = own_range(spec, mesh)
        pieces = pieces_of_range(spec, local.flatten()[start:stop], start, owned=True)
        moments[name] = Saved(spec.global_shape, pieces)
    groups = {"weights": weights, "optimizer": moments}
    return save(root, step=step, groups=groups, state={}, world=mesh.world)


def check_step(root: Path, step: int, mesh: Mesh) -> None:
    """This rank's part of the newest checkpoint, read in the layout of this mesh, is what was saved."""
    checkpoint = newest(root)
    assert checkpoint is not None
    assert checkpoint.step == step
    for name in NAMES:
        spec = spec_of(name, mesh)
        expected = spec.take(numbered(spec.global_shape)) * step
        local = torch.zeros(spec.local_shape)
        read_tensors(checkpoint, "weights", {name: Saved.of(local, spec.global_shape, spec.boxes())}, names=NAMES)
        assert torch.equal(local, expected)
        start, stop = own_range(spec, mesh)
        flat = torch.zeros(stop - start)
        pieces = pieces_of_range(spec, flat, start, owned=False)
        read_tensors(checkpoint, "optimizer", {name: Saved(spec.global_shape, pieces)}, names=NAMES)
        assert torch.equal(flat, expected.flatten()[start:stop])


def save_and_fail(*, root: Path) -> None:
    mesh = Mesh.build(dp=2, tp=2)
    assert save_step(root, 1, mesh) == root / "1"
    check_step(root, 1, mesh)
    if dist.get_rank() == 2:
        storage.os = FaultyOs(fail_at=1, code=errno.ENOSPC)  # the first write
    with pytest.raises(
        StorageError, match=r"^rank 2: .*/\.tmp-2-.*/optimizer-00002-of-00004\.safetensors: the disk is full"
    ):
        save_step(root, 2, mesh)
    dist.barrier()  # rank 0 has removed what was written
    assert sorted(path.name for path in root.iterdir()) == ["1", "latest.txt"]
    check_step(root, 1, mesh)


def read_by(*, root: Path, tp: int, dp: int) -> None:
    check_step(root, 1, Mesh.build(tp=tp, dp=dp))


def test_four_ranks_save_and_any_number_reads(tmp_path: Path) -> None:
    run_on_ranks(save_and_fail, 4, root=tmp_path)
    assert sorted(open_checkpoint(tmp_path / "1").manifest.files) == [
        *(f"optimizer-0000{rank}-of-00004.safetensors" for rank in range(4)),
        "state.json",
        *(f"weights-0000{rank}-of-00002.safetensors" for rank in range(2)),
    ]
    run_on_ranks(read_by, 2, root=tmp_path, tp=2, dp=1)
    run_on_ranks(read_by, 2, root=tmp_path, tp=1, dp=2)
    check_step(tmp_path, 1, Mesh.single())
