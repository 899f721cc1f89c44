"""Work on all ranks: what one of them meets, every one raises alike, in the words of the lowest."""

import copy
import errno
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pentode.checkpoint.folder import DamagedError
from pentode.dist.mesh import Axis
from pentode.dist.together import in_turn, on_first, on_first_at_length, tell_once, together, together_at_length
from pentode.errors import ConfigError, DataError, PentodeError, Preempted, RankError, StorageError, exit_code
from tests.helpers.faulty_os import FaultyOs
from tests.helpers.thread_ranks import Meeting, on_thread_ranks

RANKS = 3


class Ranks:
    """Three ranks that work together as `how` says, each raising what it is given; and what came of it."""

    def __init__(self, how: Callable[..., Any], errors: dict[int, Exception]) -> None:
        self.found: dict[int, object] = {}
        self.order: list[int] = []

        def work(rank: int) -> int:
            self.order.append(rank)
            if rank in errors:
                raise errors[rank]
            return rank

        def rank_main(world: Axis) -> None:
            self.found[world.rank] = how(lambda: work(world.rank), world)

        self.raised = on_thread_ranks(rank_main, [FaultyOs() for _ in range(RANKS)])

    def error(self) -> PentodeError:
        """What all of them raised alike."""
        first = self.raised[0]
        assert isinstance(first, PentodeError)
        assert [(type(error), str(error)) for error in self.raised] == [(type(first), str(first))] * RANKS
        assert all(error.everywhere for error in self.raised if isinstance(error, PentodeError))
        return first


@pytest.mark.parametrize("how", [together, in_turn, together_at_length])
def test_each_rank_has_what_its_own_work_gave(how: Callable[..., Any]) -> None:
    assert Ranks(how, {}).found == {0: 0, 1: 1, 2: 2}


@pytest.mark.parametrize("how", [on_first, on_first_at_length])
def test_the_first_rank_works_alone(how: Callable[..., Any]) -> None:
    ranks = Ranks(how, {1: DataError("never met")})
    assert (ranks.found, ranks.order) == ({0: 0, 1: None, 2: None}, [0])


def test_the_others_hear_of_long_work_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[object] = []
    enough = threading.Event()

    def gather_objects(value: object, axis: Axis) -> list[object]:
        heard.append(value)
        if len(heard) == 3:
            enough.set()
        return [value]

    monkeypatch.setattr("pentode.dist.together.gather_objects", gather_objects)
    assert on_first_at_length(lambda: enough.wait(60), Axis("world"), meet_every=0.001) is True
    assert heard[:3] == [True] * 3


def test_a_rank_that_is_done_waits_for_the_slowest_without_an_end() -> None:
    heard, enough, real = list[object](), threading.Event(), Meeting.gather_objects

    def gather_objects(meeting: Meeting, value: object, axis: Axis) -> list[object]:
        found = real(meeting, value, axis)
        if axis.rank == 0:
            heard.append(found)
            if len(heard) == 3:
                enough.set()
        return found

    def rank_main(world: Axis) -> None:
        work = enough.wait if world.rank == 1 else bool
        together_at_length(work, world, meet_every=0.001)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Meeting, "gather_objects", gather_objects)
        assert on_thread_ranks(rank_main, [FaultyOs() for _ in range(RANKS)]) == [None] * RANKS
    assert [False, True, False] in heard[:3]


def test_the_others_follow_the_first_and_not_into_its_error() -> None:
    assert Ranks(in_turn, {}).order[0] == 0
    assert Ranks(in_turn, {0: DataError("gone")}).order == [0]


@pytest.mark.parametrize(
    ("how", "befallen", "told"),
    [
        (together, (1,), "rank 1: /data: gone"),
        (together_at_length, (1,), "rank 1: /data: gone"),
        (together, (1, 2), "ranks 1 and 2: /data: gone"),
        (together, (0, 1, 2), "/data: gone"),
        (on_first, (0,), "/data: gone"),
        (on_first_at_length, (0,), "/data: gone"),
        (in_turn, (0,), "/data: gone"),
        (in_turn, (2,), "rank 2: /data: gone"),
        (in_turn, (1, 2), "ranks 1 and 2: /data: gone"),
    ],
)
def test_an_error_names_the_ranks_that_it_befell(how: Callable[..., Any], befallen: tuple[int, ...], told: str) -> None:
    error = Ranks(how, {rank: DataError("/data: gone") for rank in befallen}).error()
    assert (type(error), error.exit_code, str(error)) == (DataError, 65, told)


def test_of_several_errors_the_lowest_ranks_is_told() -> None:
    error = Ranks(together, {2: DataError("gone"), 1: StorageError("full")}).error()
    assert (type(error), str(error)) == (StorageError, "rank 1: full")


def test_each_problem_of_a_config_names_its_rank() -> None:
    error = Ranks(together, {1: ConfigError(["a: 1", "b: 2"])}).error()
    assert isinstance(error, ConfigError)
    assert error.problems == ["rank 1: a: 1", "rank 1: b: 2"]
    assert error.printed == "rank 1: a: 1\nrank 1: b: 2"


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a"), 74, r"rank 2: \[Errno 28\] No space left on device"),
        (MemoryError("all gone"), 71, "rank 2: all gone$"),
        (KeyError("our bug"), 70, r"rank 2: Traceback(?s:.)*\nKeyError: 'our bug'$"),
    ],
)
def test_errors_that_are_not_ours_have_their_codes_and_a_bug_its_traceback(
    error: Exception, code: int, told: str
) -> None:
    found = Ranks(together, {2: error}).error()
    assert type(found) is RankError
    assert (found.exit_code, exit_code(found)) == (code, code)
    with pytest.raises(RankError, match=f"^{told}"):
        raise found


def test_one_process_raises_what_it_met() -> None:
    error = KeyError("our bug")

    def fails() -> None:
        raise error

    for how in (together, on_first, in_turn):
        with pytest.raises(KeyError) as raised:
            how(fails, Axis("world"))
        assert raised.value is error


def test_a_signal_waits_for_nobody() -> None:
    raised = Ranks(together, {1: Preempted("SIGTERM")}).raised
    assert isinstance(raised[1], Preempted)
    assert not raised[1].everywhere


@pytest.mark.parametrize(
    "error",
    [
        ConfigError(["a: 1", "b: 2"]),
        DamagedError("checkpoint 3: is damaged", remedy="copy it"),
        RankError.of(OSError("x")),
    ],
)
def test_errors_arrive_on_other_ranks_as_they_left(error: PentodeError) -> None:
    again = copy.copy(error)  # as pickle does it
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
    assert again.exit_code == error.exit_code


def test_the_first_rank_tells_before_anybody_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    error = DataError("/data: gone")
    told = []
    for rank in (1, 0):
        tell_once(error, rank=rank, wait_for_all=lambda: told.append(capsys.readouterr().err))
    assert told == ["", "pentode: /data: gone\n"]
    assert error.told
