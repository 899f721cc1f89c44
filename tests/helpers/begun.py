"""A run that begins with existing weights, in any layout: what it begins with, and what it read for that."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pentode.checkpoint import storage, stored
from pentode.checkpoint.manifest import FileFacts
from pentode.checkpoint.stored import InFile
from pentode.config.kinds.init import ExistingCheckpointInit
from pentode.dist.collectives import sum_
from pentode.dist.launch import World
from pentode.parallel.batch import batch_of
from pentode.run import build
from pentode.run.build import Run
from tests.helpers.cases import Case, Problem, config_of, global_batch, whole

ROWS = 256  # bytes read at once


@dataclass
class Begun:
    """A run's first weights and masters, whole; bytes that this rank holds, read and hashed; logits, of one process."""

    weights: dict[str, Tensor]
    masters: dict[str, Tensor]
    held: int
    read: int
    hashed: int
    logits: Tensor | None


def begun(case: Case, path: str, dtype: str) -> Begun:
    """Begin a run in this layout with the weights of a folder."""
    config = config_of(case)
    method = ExistingCheckpointInit(path=Path(path))
    config = replace(config, model=replace(config.model, init_method=method, dtype=dtype))
    device, mesh = torch.device("cpu"), build.build_mesh(config)
    stages = build.build_stages(config, mesh, device)
    no_feed: Any = None
    run = build.assemble(config, World(mesh.world.rank, mesh.world.size), mesh, device, no_feed, stages)
    read = 0
    plain = InFile.rows

    def rows(self: InFile, first: int, count: int) -> Tensor:
        nonlocal read
        found = plain(self, first, count)
        assert found.nbytes <= max(ROWS, found[0].nbytes), f"{found.nbytes} bytes at once"
        read += found.nbytes
        return found

    def hash_file(path: Path) -> FileFacts:
        nonlocal hashed
        found = real(path)
        hashed += found.size
        return found

    hashed, real = 0, storage.hash_file
    storage.hash_file = hash_file
    stored.AT_ONCE, InFile.rows, before = ROWS, rows, stored.AT_ONCE
    try:
        build.initialise_weights(run)
    finally:
        stored.AT_ONCE, InFile.rows, storage.hash_file = before, plain, real
    run.master.wait_for()
    weights = {name: p.detach().double() for stage in stages.values() for name, p in stage.named_parameters()}
    masters = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    for name, parts in run.master.by_name([shard.weight for shard in run.master.shards]).items():
        for start, part in parts:
            masters[name].view(-1)[start : start + part.numel()] = part
    if run.master.sharded:  # each data rank has its shards
        masters = {name: sum_(master, mesh.data) for name, master in masters.items()}
    held = sum(tensor.numel() for tensor in weights.values()) * torch.float32.itemsize
    return Begun(whole(run, weights), whole(run, masters), held, read, hashed, logits_of(run))


def begun_with_each(cases: dict[str, Case]) -> list[Begun]:
    """What float64 runs begin with, one after the other, by the folders of their weights."""
    return [begun(case, path, "float64") for path, case in cases.items()]


def logits_of(run: Run) -> Tensor | None:
    """Of the whole model in one process."""
    if run.mesh.world.size > 1:
        return None
    (model,), batch = run.stages.values(), global_batch(Problem(), 0)[0]
    with torch.no_grad():
        return model.logits(None, batch_of(batch, samples=torch.arange(len(batch))))
