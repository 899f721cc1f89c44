"""What saving beside training promises: the bytes of the moment, through as little memory as is given, and no hang."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pentode import device as devices
from pentode.checkpoint import storage
from pentode.checkpoint.background import Background, HostCache, Snapshot
from pentode.checkpoint.layout import Saved
from pentode.checkpoint.save import save
from tests.helpers.faulty_os import FaultyOs
from tests.helpers.layouts import numbered

CPU = torch.device("cpu")
PATIENCE = 60.0  # seconds after which what should end is taken for hung
Groups = dict[str, dict[str, Saved]]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "os", FaultyOs())


def some_groups() -> Groups:
    """Tensors of several dtypes, one a block that is not contiguous, one without elements; and an empty group."""
    block = numbered((6, 8))[1:5, 2:7]
    weights = {"a": Saved.whole(numbered((3, 5)).bfloat16()), "b": Saved((6, 8), [((1, 2), block)])}
    moments = {"m": Saved.whole(numbered((17,))), "n": Saved.whole(torch.empty(0)), "o": Saved.whole(torch.tensor(7))}
    return {"weights": weights, "optimizer": moments, "nothing": {}}


def snapshot_of(groups: Groups, *, chunk: int, limit: int | None = None, staged: bool = False) -> Snapshot:
    return Snapshot(groups, HostCache(CPU, limit=limit, chunk=chunk), devices.Lane(CPU), staged=staged)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change(groups: Groups) -> None:
    for group in groups.values():
        for saved in group.values():
            for _, tensor in saved.pieces:
                tensor.zero_()


@given(chunk=st.integers(1, 80), chunks=st.none() | st.integers(1, 3), staged=st.booleans())
def test_the_files_are_those_of_a_save_that_is_waited_for(
    tmp_path_factory: pytest.TempPathFactory, chunk: int, chunks: int | None, staged: bool
) -> None:
    root, groups = tmp_path_factory.mktemp("run"), some_groups()
    plain = save(root / "plain", step=3, groups=groups, state={"updates": 3})
    snapshot = snapshot_of(groups, chunk=chunk, limit=None if chunks is None else chunk * chunks, staged=staged)
    beside = save(root / "beside", step=3, groups=groups, state={"updates": 3}, read=snapshot.read)
    assert files(beside) == files(plain)


@pytest.mark.parametrize("staged", [False, True])
def test_what_changes_after_the_snapshot_is_not_saved(tmp_path: Path, staged: bool) -> None:
    groups = some_groups()
    plain = save(tmp_path / "plain", step=3, groups=groups, state={})
    snapshot, background = snapshot_of(groups, chunk=8, staged=staged), Background()
    background.start(lambda: save(tmp_path / "beside", step=3, groups=groups, state={}, read=snapshot.read))
    snapshot.wait_for_copies()
    change(groups)
    background.wait()
    assert files(tmp_path / "beside" / "3") == files(plain)


def test_an_update_waits_while_there_is_no_room_for_copies() -> None:
    groups = {"w": {"w": Saved.whole(numbered((8,)))}}
    snapshot, expected = snapshot_of(groups, chunk=8, limit=16), numbered((8,)).numpy().tobytes()
    update = threading.Thread(target=lambda: (snapshot.wait_for_copies(), change(groups)))
    update.start()
    read, found = snapshot.read("w"), b""
    for _ in range(2):  # of the four pieces two are read, one is in the other chunk, and one waits for a chunk
        found += bytes(next(read))
        update.join(0)
        assert update.is_alive()
    found += b"".join(map(bytes, read))
    update.join(PATIENCE)
    assert not update.is_alive()
    assert found == expected
    assert not groups["w"]["w"].pieces[0][1].any()


@pytest.mark.parametrize("limit", [None, 24])
def test_chunks_are_made_once_and_used_again(monkeypatch: pytest.MonkeyPatch, limit: int | None) -> None:
    made: list[int] = []
    real = devices.host_bytes
    monkeypatch.setattr(devices, "host_bytes", lambda count, *a, **k: made.append(count) or real(count, *a, **k))
    cache = HostCache(CPU, limit=limit, chunk=8)
    for _ in range(3):
        snapshot = Snapshot({"w": {"w": Saved.whole(numbered((16,)))}}, cache, devices.Lane(CPU), staged=False)
        assert b"".join(map(bytes, snapshot.read("w"))) == numbered((16,)).numpy().tobytes()
    assert made == [8] * (3 if limit else 8)


def test_what_was_staged_is_given_back_as_soon_as_it_is_on_the_host() -> None:
    snapshot = snapshot_of({"w": {"w": Saved.whole(numbered((16,)))}}, chunk=8, staged=True)
    sources = [source for part in snapshot._to_copy for source in part.sources]
    assert len(sources) == 8
    parts = list(snapshot._to_copy)
    next(snapshot.read("w"))
    assert [part.sources for part in parts] == [[]] * 8


def test_a_save_that_fails_holds_up_no_update_and_gives_its_memory_back() -> None:
    groups = {"w": {"w": Saved.whole(numbered((16,)))}}
    cache = HostCache(CPU, limit=16, chunk=8)
    for _ in range(3):
        snapshot = Snapshot(groups, cache, devices.Lane(CPU), staged=False)
        read = snapshot.read("w")
        next(read)
        snapshot.release()
        snapshot.wait_for_copies()
    whole = Snapshot(groups, cache, devices.Lane(CPU), staged=False)
    assert b"".join(map(bytes, whole.read("w"))) == numbered((16,)).numpy().tobytes()


def test_an_error_beside_the_training_is_told_when_it_is_waited_for() -> None:
    background, begun = Background(), threading.Event()

    def fail() -> None:
        begun.wait(PATIENCE)
        raise OSError("full")

    background.start(fail)
    assert background.busy
    assert not background.is_done()
    begun.set()
    assert background.is_done(within=PATIENCE)
    assert background.failed
    with pytest.raises(OSError, match="full"):
        background.wait()
    assert not background.busy
    assert not background.failed
    background.wait()  # nothing is under way


def test_only_one_save_is_under_way() -> None:
    background, end = Background(), threading.Event()
    background.start(lambda: end.wait(PATIENCE))
    with pytest.raises(AssertionError, match="a save is under way"):
        background.start(end.set)
    end.set()
    background.wait()


def test_groups_are_read_in_their_order() -> None:
    snapshot = snapshot_of(some_groups(), chunk=8)

    def read(group: str) -> Iterator[memoryview]:
        return snapshot.read(group)

    assert b"".join(map(bytes, read("nothing"))) == b""
    assert b"".join(map(bytes, read("weights"))) == b"", "the optimizer's bytes come first"


def test_work_that_was_given_up_does_not_give_up_the_next() -> None:
    background = Background()
    background.start(lambda: None)
    background.cancelled.set()
    background.wait()
    seen: list[bool] = []
    background.start(lambda: seen.append(background.cancelled.is_set()))
    background.wait()
    assert seen == [False]
