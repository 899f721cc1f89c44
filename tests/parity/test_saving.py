"""Ranks that save beside their training: the files are those of a save that is waited for, trouble is everybody's."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pentode.checkpoint import storage
from pentode.checkpoint.folder import open_checkpoint
from pentode.checkpoint.save import size_of
from pentode.dist.launch import World
from pentode.errors import StorageError
from pentode.metrics.sinks import Sinks
from pentode.run.build import Run, build, initialise_weights
from pentode.train import loop, saving
from pentode.train.loop import train
from pentode.train.saving import Saver, check_room
from pentode.train.signals import StopSignal
from pentode.train.state import TrainState
from pentode.train.state import content as state_content
from tests.helpers.faulty_os import FaultyOs
from tests.helpers.tiny import tiny_config
from tests.helpers.world import WORLD

LAYOUTS: list[dict[str, Any]] = [
    {"dp": 1, "tp": 1, "pp": 1},
    {"dp": 2, "tp": 1, "pp": 1},
    {"dp": 2, "tp": 2, "pp": 1},
    {"dp": 1, "tp": 2, "pp": 2},
]


def run_in(folder: Path, layout: dict[str, Any], changes: dict[str, Any]) -> Run:
    world = World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()
    micro_batch = 4 // layout["dp"]
    run = build(
        tiny_config(folder, parallelism=layout, tokens__micro_batch_size=micro_batch, **changes), world, first_step=1
    )
    initialise_weights(run)
    return run


def train_in(run: Run, root: Path, *, published: list[Path]) -> TrainState:
    state = TrainState()
    train(run, state, root=root, sinks=Sinks([]), stop=StopSignal(run.device), published=[published.append])
    return state


def waited_for(run: Run, root: Path, stop: StopSignal, **named: Any) -> Saver:
    """A Saver that writes while training waits, whatever the config says."""
    saver = Saver(run, root, stop, **named)
    saver.asynchronous = False
    return saver


def two_ways(*, folder: Path, layout: dict[str, Any], changes: dict[str, Any]) -> None:
    """Train in folder/beside, and in folder/waited with saves that are waited for."""
    for name, saver in (("beside", Saver), ("waited", waited_for)):
        run, found = run_in(folder, layout, changes), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "Saver", saver)
            state = train_in(run, folder / name, published=found)
        assert found == [folder / name / str(step) for step in (4, 8, 12)]
        assert state.step == 12


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "changes",
    [{"model__dtype": "bfloat16", "optimizer__zero_stage": 1}, pytest.param({}, marks=pytest.mark.long)],
    ids=["zero1", "zero0"],
)
def test_the_files_are_those_of_saves_that_are_waited_for(
    tmp_path: Path, layout: dict[str, Any], changes: dict[str, Any]
) -> None:
    ranks = layout["dp"] * layout["tp"] * layout["pp"]
    arguments = {"folder": tmp_path, "layout": layout, "changes": changes}
    two_ways(**arguments) if ranks == 1 else WORLD.run(two_ways, ranks, **arguments)
    beside, waited = content(tmp_path / "beside"), content(tmp_path / "waited")
    assert {name for name in beside if name.endswith("manifest.json")} == {
        f"{step}/manifest.json" for step in (4, 8, 12)
    }
    assert beside == waited
    for step in (4, 8, 12):
        open_checkpoint(tmp_path / "beside" / str(step)).verify()


def one_disk_is_full(*, folder: Path, policy: str, engine: str) -> None:
    """The second save fails on the last of four ranks; with `warn` the next one is made."""
    changes = {"checkpoints__on_save_error": policy, "checkpoints__checkpointing_engine": engine}
    run = run_in(folder, {"dp": 2, "tp": 2, "pp": 1}, changes)
    root, found = folder / "run", []
    real = Saver.save

    def save(saver: Saver, state: TrainState, *, last: bool = False) -> None:
        saver.settle()
        broken = dist.get_rank() == 3 and state.step == 8
        storage.os = FaultyOs(fail_at=1 if broken else None, code=errno.ENOSPC)
        real(saver, state, last=last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "os", storage.os)
        patch.setattr(Saver, "save", save)
        if policy == "stop":
            with pytest.raises(StorageError, match=r"^rank 3: .*/\.tmp-8-.*: the disk is full") as caught:
                train_in(run, root, published=found)
            assert caught.value.everywhere
        else:
            assert train_in(run, root, published=found).step == 12
    dist.barrier()
    steps = [4] if policy == "stop" else [4, 12]
    assert found == [root / str(step) for step in steps]
    assert sorted(path.name for path in root.iterdir()) == sorted([*map(str, steps), "latest.txt"])


@pytest.mark.parametrize(("policy", "engine"), [("stop", "async"), ("warn", "async"), ("stop", "torch")])
def test_a_disk_that_is_full_for_one_rank_leaves_run_and_checkpoints_intact(
    tmp_path: Path, policy: str, engine: str
) -> None:
    WORLD.run(one_disk_is_full, 4, folder=tmp_path, policy=policy, engine=engine)
    for path in (tmp_path / "run").glob("[0-9]*"):
        open_checkpoint(path).verify()


def a_thread_breaks(*, folder: Path) -> None:
    """What the last of four ranks' thread meets it cannot even tell the others."""
    run = run_in(folder, {"dp": 2, "tp": 2, "pp": 1}, {})
    breaks = dist.get_rank() == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pentode.train.saving.ENDING", 0.1)
        if breaks:
            patch.setattr("pentode.train.saving.save", broken)
        with pytest.raises(RuntimeError, match="bits fell out" if breaks else "it failed on another rank"):
            train_in(run, folder / "run", published=[])
    dist.barrier()


def broken(root: Path, **content: object) -> Path:
    raise RuntimeError("bits fell out")


def test_a_thread_that_broke_holds_up_nobody(tmp_path: Path) -> None:
    WORLD.run(a_thread_breaks, 4, folder=tmp_path)
    assert [path.name for path in (tmp_path / "run").glob("[0-9]*")] == []


def removed_here(*, folder: Path) -> list[int]:
    """After which steps this rank removes older checkpoints."""
    run, steps = run_in(folder, {"dp": 2, "tp": 2, "pp": 1}, {"checkpoints__keep_last": 1}), []
    real = saving.prune

    def noted(root: Path, step: int, **kept: Any) -> object:
        steps.append(step)
        return real(root, step, **kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "prune", noted)
        train_in(run, folder / "run", published=[])
    return steps


def test_the_first_rank_alone_removes_older_checkpoints(tmp_path: Path) -> None:
    assert WORLD.run(removed_here, 4, folder=tmp_path) == [[4, 8, 12], [], [], []]
    assert [path.name for path in (tmp_path / "run").glob("[0-9]*")] == ["12"]


def refused_for_room(*, folder: Path) -> tuple[str, int, int]:
    """What a rank is told where the first one's disk is full; what it would write of a checkpoint, and of weights."""
    changes = {"optimizer__zero_stage": 1, "checkpoints__save_hf": True}
    run = run_in(folder, {"dp": 2, "tp": 2, "pp": 1}, changes)
    what = state_content(run, TrainState())
    files = what["files"] if dist.get_rank() == 0 else {}
    real = shutil.disk_usage
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:  # who looks for all
            patch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=0))
        with pytest.raises(StorageError) as caught:
            check_room(run, TrainState(), folder)
    assert caught.value.everywhere
    return str(caught.value), size_of(what["groups"], files), size_of({"weights": what["groups"]["weights"]}, files)


def test_room_is_asked_for_what_all_ranks_write(tmp_path: Path) -> None:
    told, sizes, weights = zip(*WORLD.run(refused_for_room, 4, folder=tmp_path), strict=True)
    assert len(set(told)) == 1
    assert f": checkpoints of {sum(sizes):,} bytes, " in told[0]
    assert f" with Hugging Face folders of {sum(weights):,} bytes, " in told[0]
