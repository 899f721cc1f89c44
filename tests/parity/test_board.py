"""Ranks that tell each other things beside their collectives, from another thread."""

import threading

import pytest
import torch
import torch.distributed as dist

from pentode.dist import collectives
from pentode.dist.board import Cancelled
from pentode.dist.mesh import Axis, Mesh, everyone
from pentode.dist.together import together
from pentode.errors import CheckpointError, RankError, StorageError
from tests.helpers.world import WORLD

RANKS = 3
TURNS = 5


def everything_beside_the_training() -> None:
    world, cancelled = everyone(), threading.Event()
    own, other = collectives.beside(world, cancelled), collectives.beside(world, cancelled)
    found: list[list[object]] = []

    def tell() -> None:
        found.extend(own.board.gather({"turn": turn, "rank": own.rank}) for turn in range(TURNS))

    thread = threading.Thread(target=tell)
    thread.start()
    for turn in range(TURNS):  # meanwhile this thread's collectives and boards go their own way
        assert collectives.sum_(torch.tensor([1 << turn]), world).item() == RANKS << turn
        assert collectives.gather_objects(other.rank, other) == list(range(RANKS))
    thread.join()
    assert found == [[{"turn": turn, "rank": rank} for rank in range(RANKS)] for turn in range(TURNS)]


def test_each_rank_hears_all_others_in_turn() -> None:
    WORLD.run(everything_beside_the_training, RANKS)


def members_of_each_line() -> None:
    mesh = Mesh.build(dp=2, tp=2)
    rank = mesh.world.rank
    for axis, members in ((mesh.tp, [rank // 2 * 2, rank // 2 * 2 + 1]), (mesh.dp, [rank % 2, rank % 2 + 2])):
        assert collectives.gather_objects(rank, axis) == members
        other = collectives.beside(axis, threading.Event())
        assert collectives.gather_objects(rank, other) == members
        assert (other.name, other.size, other.rank) == (axis.name, axis.size, members.index(rank))


def test_each_rank_hears_those_of_its_line() -> None:
    WORLD.run(members_of_each_line, 4)


def work_together() -> None:
    world = collectives.beside(everyone(), threading.Event())

    def fail() -> None:
        if world.rank == 1:
            raise StorageError("/run: the disk is full")
        if world.rank == 2:
            raise KeyError("a bug")

    with pytest.raises(StorageError, match=r"^rank 1: /run: the disk is full$") as caught:
        together(fail, world)
    assert caught.value.everywhere

    def fail_otherwise() -> None:
        if world.rank == 2:
            raise OSError(28, "No space left")

    with pytest.raises(RankError, match=r"^rank 2: .Errno 28. No space left$") as caught:
        together(fail_otherwise, world)
    assert caught.value.exit_code == 74
    assert together(lambda: world.rank, world) == world.rank


def test_what_one_meets_all_raise() -> None:
    WORLD.run(work_together, RANKS)


def leave_one_waiting() -> None:
    cancelled = threading.Event()
    world = collectives.beside(everyone(), cancelled)
    if world.rank > 0:
        timer = threading.Timer(0.01, cancelled.set)
        timer.start()
        with pytest.raises(Cancelled):
            collectives.gather_objects(1, world)
    dist.barrier()


def test_who_waits_for_nobody_can_be_called_back() -> None:
    WORLD.run(leave_one_waiting, 2)


def test_alone_there_is_no_board() -> None:
    world = collectives.beside(Axis("world"), threading.Event())
    assert collectives.gather_objects(CheckpointError("x"), world)[0].exit_code == 66
