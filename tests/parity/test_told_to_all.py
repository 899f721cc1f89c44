"""What goes wrong on one rank while a run begins all ranks hear of, and nobody takes away what others still read."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from pentode.config.kinds.init import ExistingCheckpointInit
from pentode.dist.mesh import Axis, everyone
from pentode.errors import StorageError
from pentode.run import build
from pentode.train import copies as copies_module
from pentode.train.copies import BORROWED, WHEN_STOPPED, Copies, Place, borrow, give_back
from tests.helpers.cases import Case, Problem, run_of
from tests.helpers.world import WORLD

PLACE = Place("s3://bucket/run", is_the_run=True, remove=True)


def one_fails(*, folder: Path) -> None:
    world = everyone()

    def fail(*_: object, **__: object) -> None:
        raise StorageError("the store is gone")

    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 0:
            patch.setattr(Copies, "_brought", fail)
            patch.setattr(copies_module, "locate", fail)
        for work in (lambda: Copies(PLACE, folder, world).bring(last=1), lambda: borrow("s3://b/other", folder, world)):
            with pytest.raises(StorageError, match="the store is gone") as raised:
                work()
            assert raised.value.everywhere
    run = run_of(Case(Problem(), dp=2, tp=2))
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(build, "initial_weights", fail)
        with pytest.raises(StorageError, match="rank 1: the store is gone"):
            build.initialise_weights(run)
    method = ExistingCheckpointInit(path=folder)
    run.config = replace(run.config, model=replace(run.config.model, init_method=method))
    for last, looks in ((0, "kind_of"), (3, "source_of")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "kind_of", lambda path: "of transformers")
            patch.setattr(build, "source_of", lambda *_, **__: None)
            if world.rank == last:
                patch.setattr(build, looks, fail)
            with pytest.raises(StorageError, match=r"rank 3: the store is gone" if last else r"^the store is gone"):
                build.initialise_weights(run)


def test_what_one_rank_cannot_read_all_hear_of(tmp_path: Path) -> None:
    WORLD.run(one_fails, 4, folder=tmp_path)


def gives_back(*, folder: Path) -> bool:
    """Whether what was borrowed is there while the second rank still reads it, and gone when it has come."""
    world, store = everyone(), dist.PrefixStore("t", dist.distributed_c10d._get_default_store())
    if world.rank == 1:
        store.wait(["come"])
        give_back(folder, world)
        return not (folder / BORROWED).exists()
    (folder / BORROWED).mkdir()
    thread = threading.Thread(target=give_back, args=(folder, world))
    thread.start()
    thread.join(0.1)  # far longer than it takes to remove a folder
    there = (folder / BORROWED).exists()
    store.set("come", "")
    thread.join()
    return there and not (folder / BORROWED).exists()


def test_what_was_borrowed_goes_when_all_have_read_it(tmp_path: Path) -> None:
    assert WORLD.run(gives_back, 2, folder=tmp_path) == [True, True]


def test_a_run_that_is_stopped_waits_for_a_third_of_its_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(Copies, "_wait", lambda copies, seconds: asked.append(seconds))
    for grace_s in (0.3 * WHEN_STOPPED, 30 * WHEN_STOPPED):
        Copies(PLACE, tmp_path, Axis("world")).finish_soon(grace_s=grace_s)
    assert asked == [pytest.approx(0.1 * WHEN_STOPPED), WHEN_STOPPED]
