"""A signal that ends one rank alone ends all with its code, and is told once."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from pentode.dist import launch
from pentode.dist.collectives import gather_objects, wait_for_all
from pentode.dist.launch import disconnect
from pentode.dist.leaving import heard_by_others
from pentode.dist.mesh import everyone
from pentode.errors import ConfigError, Interrupted, PentodeError, Preempted, RankError
from tests.helpers.source import ROOT
from tests.helpers.tiny import tiny_yaml
from tests.helpers.world import WORLD

PATIENCE = 240.0  # seconds for processes that load torch, on a busy machine
LEAVES = """
import os
if os.environ.get("RANK") == "1":
    import signal
    from pentode.train import start
    start._source = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
"""


def raised(error: BaseException, store: dist.Store | None, *, rank: int) -> BaseException:
    """What a rank ends with that meets this error."""
    with pytest.raises(BaseException) as caught, heard_by_others(store, rank=rank):
        raise error
    return caught.value


def test_of_several_ranks_that_leave_one_tells() -> None:
    store, errors = dist.HashStore(), [Preempted("SIGTERM: saved"), Preempted("SIGTERM: saved"), Interrupted("SIGINT")]
    for rank, error in enumerate(errors):
        assert raised(error, store, rank=rank) is error
    assert [error.told for error in errors] == [False, True, True]


def test_nobody_waits_for_a_rank_that_has_left() -> None:
    store = dist.HashStore()
    raised(Preempted("SIGTERM: nothing was trained yet"), store, rank=1)
    with pytest.raises(Preempted) as caught:
        launch._wait(store, ["problems of 1"])
    assert caught.value.told


@pytest.mark.parametrize(
    ("error", "code"), [(Preempted("SIGUSR1"), 75), (Interrupted("x"), 130), (KeyboardInterrupt(), 130)]
)
def test_what_goes_wrong_after_a_rank_has_left_is_its_leaving(error: BaseException, code: int) -> None:
    store = dist.HashStore()
    assert raised(error, store, rank=1) is error
    found = raised(RuntimeError("Connection closed"), store, rank=0)
    assert isinstance(found, PentodeError)
    assert (found.exit_code, found.told) == (code, True)
    refused = ConfigError(["a: 1"])
    assert raised(refused, store, rank=0) is refused


@pytest.mark.parametrize("store", [None, dist.HashStore()], ids=["alone", "others"])
def test_an_error_of_its_own_stays_what_it_is(store: dist.Store | None) -> None:
    for error in (RuntimeError("our bug"), KeyError("our bug"), RankError("told")):
        assert raised(error, store, rank=0) is error
    assert not (store is None and raised(Preempted("SIGTERM"), store, rank=0).told)


class Gone(dist.HashStore):
    """A store whose process has ended."""

    def check(self, keys: list[str]) -> bool:
        raise RuntimeError("Connection reset by peer")

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        raise RuntimeError("Connection reset by peer")


def test_a_store_that_is_gone_changes_nothing() -> None:
    for error in (RuntimeError("our bug"), Preempted("SIGTERM")):
        assert raised(error, Gone(), rank=0) is error


def first_ends_as(*, leaves: bool) -> tuple[type, int, str]:
    """What the first rank meets when the second one's connections close, after a word or without."""
    world, store = everyone(), dist.PrefixStore("t", dist.distributed_c10d._get_default_store())
    gather_objects(None, world)  # they are connected
    if world.rank == 1:
        with pytest.raises(Preempted if leaves else ValueError), heard_by_others(store, rank=1):
            raise Preempted("SIGTERM: x") if leaves else ValueError
        disconnect()
        return type(None), 0, ""
    with pytest.raises(PentodeError) as caught, heard_by_others(store, rank=0):
        gather_objects(None, world)
    return type(caught.value), caught.value.exit_code, str(caught.value)


def test_the_others_end_as_the_rank_that_left() -> None:
    assert WORLD.run(first_ends_as, 2, leaves=True)[0] == (Preempted, 75, "SIGTERM: x")


def test_a_rank_that_ended_without_a_word_costs_the_others_a_line() -> None:
    kind, code, line = WORLD.run(first_ends_as, 2, leaves=False)[0]
    assert (kind, code) == (RankError, 70)
    assert line == "rank 0: the connection to another rank is lost; see what that one, or its host, says"


def first_waits() -> bool:
    """Whether the first rank still waits while the second has not come."""
    world, store = everyone(), dist.PrefixStore("t", dist.distributed_c10d._get_default_store())
    if world.rank == 1:
        store.wait(["come"])
        wait_for_all()
        return True
    thread = threading.Thread(target=wait_for_all)
    thread.start()
    thread.join(0.1)  # far longer than it takes to wait for nobody
    waits = thread.is_alive()
    store.set("come", "")
    thread.join()
    return waits


def test_who_waits_for_all_waits_until_the_last_has_come() -> None:
    assert WORLD.run(first_waits, 2) == [True, True]


def test_local_processes_end_with_75_and_one_line_when_one_is_preempted_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LEAVES)
    file = tiny_yaml(tmp_path, parallelism={"dp": 2, "tp": 1, "pp": 1})
    ended = subprocess.run(
        [sys.executable, "-m", "pentode", "train", str(file), "--nproc", "2"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    line = "pentode: SIGTERM: nothing was trained since the last checkpoint; the same command goes on from there\n"
    assert (ended.returncode, ended.stderr) == (75, line)
