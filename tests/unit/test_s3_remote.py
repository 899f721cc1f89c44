"""Checkpoints sent to an object store: manifest last, everything read back, whatever fails on the way."""

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pentode.checkpoint.folder import DamagedError
from pentode.checkpoint.manifest import MANIFEST
from pentode.errors import StorageError
from tests.helpers.object_store import Bucket, FakeTime, Fault, Gate
from tests.helpers.sent import (
    WEIGHTS,
    bucket_in_parts,
    checkpoint,
    contents,
    fetch,
    flip,
    remote_of,
    through,
    upload,
    whole,
)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket, into which files of more than 16 KiB go in parts."""
    with bucket_in_parts(monkeypatch) as made:
        yield made


def test_what_is_fetched_is_what_was_saved(tmp_path: Path, store: Bucket) -> None:
    folder, remote = checkpoint(tmp_path / "a", 4), remote_of(store)
    upload(remote, folder)
    assert whole(store, folder)
    assert store.unfinished() == 0
    fetched = fetch(remote, 4, tmp_path / "b")
    assert fetched is not None
    assert contents(fetched) == contents(folder)
    assert fetch(remote, 5, tmp_path / "b") is None


def test_the_manifest_is_the_last_object_and_everything_is_read_back_before(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with through(lambda request, _: None, monkeypatch) as proxy:
        upload(remote_of(store), checkpoint(tmp_path, 4))
    changes = [one for one in proxy.requests if one.startswith(("PUT", "POST", "DELETE"))]
    published = proxy.requests.index(next(one for one in proxy.requests if re.match(rf"PUT .*/{MANIFEST}", one)))
    assert changes[-1] == proxy.requests[published]
    before = proxy.requests[:published]
    for name in (WEIGHTS, "state.json"):
        last_change = max(i for i, one in enumerate(before) if name in one and one.startswith(("PUT", "POST")))
        assert any(one.startswith("GET") and f"/4/{name}" in one for one in before[last_change:])
    assert sum("partNumber=" in one for one in changes) == 3
    assert proxy.requests[-1].startswith("GET")
    assert proxy.requests[-1].endswith(MANIFEST)


def cut(place: str, at: float) -> Fault:
    return Fault(sent=at) if place == "request" else Fault(received=at)


@pytest.mark.parametrize("place", ["request", "answer"])
def test_every_dropped_connection_is_made_again(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    draw = random.Random(place)
    folder = checkpoint(tmp_path, 4)
    all_requests_fail_once(tmp_path, store, monkeypatch, folder, lambda _: cut(place, draw.random()))


@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown"), (429, "Throttling")])
def test_every_busy_answer_is_asked_for_again(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    folder = checkpoint(tmp_path, 4)
    all_requests_fail_once(tmp_path, store, monkeypatch, folder, lambda _: Fault(answer=status, code=code))


def all_requests_fail_once(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch, folder: Path, fault: Callable[[int], Fault]
) -> None:
    """Send and fetch a checkpoint where each request fails the first time that it is made."""
    seen: set[str] = set()

    def plan(request: str, number: int) -> Fault | None:
        plain = re.sub(r"uploadId=[^&]*", "", request)
        if plain in seen:
            return None
        seen.add(plain)
        return fault(number)

    with through(plan, monkeypatch) as proxy:
        remote = remote_of(store)
        upload(remote, folder)
        assert whole(store, folder)
        fetched = fetch(remote, 4, tmp_path / "there")
    assert fetched is not None
    assert contents(fetched) == contents(folder)
    assert proxy.faults == len(seen) > 12
    assert len(proxy.requests) >= 2 * len(seen)


def test_a_store_that_does_not_answer_is_asked_again(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, gate = checkpoint(tmp_path, 4), Gate("partNumber=2")
    with through(gate, monkeypatch) as proxy:
        upload(remote_of(store, seconds=0.3), folder)
    assert not proxy.forgotten
    gate.opened.set()
    assert gate.count == 2
    assert whole(store, folder)


def test_a_dead_store_is_given_up_within_the_limit(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, time = checkpoint(tmp_path, 4), FakeTime()
    with (
        through(lambda request, _: Fault(answer=500) if request.startswith("P") else None, monkeypatch),
        pytest.raises(StorageError, match=r"runs/a/4: the store answers InternalError \(500\), for 1\d\d s"),
    ):
        upload(remote_of(store, time, limit=100.0), folder)
    assert 70 < time.time < 200  # two files at a time, each with waits of its own
    assert f"4/{MANIFEST}" not in store.names()
    assert (folder / MANIFEST).exists()


def test_a_refusal_is_told_at_once(tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, time = checkpoint(tmp_path, 4), FakeTime()
    with (
        through(lambda request, _: Fault(answer=403, code="AccessDenied") if request[0] == "P" else None, monkeypatch),
        pytest.raises(StorageError, match="access is refused"),
    ):
        upload(remote_of(store, time), folder)
    assert time.waits == []
    assert f"4/{MANIFEST}" not in store.names()


def test_expired_credentials_are_asked_for_again(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, told = checkpoint(tmp_path, 4), []

    def expired(request: str, number: int) -> Fault | None:
        if "partNumber=2" in request and not told:
            told.append(number)
            return Fault(answer=400, code="ExpiredToken")
        return None

    with through(expired, monkeypatch) as proxy:
        remote = remote_of(store)
        before = remote.objects._store
        upload(remote, folder)
    assert proxy.faults == 1
    assert remote.objects._store is not before
    assert whole(store, folder)


def test_what_comes_back_changed_is_sent_again(tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, changed = checkpoint(tmp_path, 4), []

    def once(request: str, _: int) -> Fault | None:
        if request.startswith("GET") and f"/4/{WEIGHTS}" in request and not changed:
            changed.append(request)
            return Fault(change=lambda body: bytes([body[0] ^ 1]) + body[1:])
        return None

    with through(once, monkeypatch) as proxy:
        upload(remote_of(store), folder)
    assert whole(store, folder)
    assert sum("POST" in one and "?uploads" in one for one in proxy.requests) == 2


def test_an_answer_that_is_shorter_than_it_should_be_is_asked_for_again(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shortened = checkpoint(tmp_path, 4), []

    def once(request: str, _: int) -> Fault | None:
        if request.startswith("GET") and f"/4/{WEIGHTS}" in request and not shortened:
            shortened.append(request)
            return Fault(change=lambda body: body[:100])
        return None

    with through(once, monkeypatch) as proxy:
        upload(remote_of(store), folder)
    assert whole(store, folder)
    assert proxy.faults == 1
    assert sum("POST" in one and "?uploads" in one for one in proxy.requests) == 1


def test_a_store_that_changes_what_it_is_given_never_has_the_checkpoint(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path, 4)

    def always(request: str, _: int) -> Fault | None:
        wrong = request.startswith("GET") and f"/4/{WEIGHTS}" in request
        return Fault(change=lambda body: bytes([body[0] ^ 1]) + body[1:]) if wrong else None

    with through(always, monkeypatch), pytest.raises(StorageError, match="sent 3 times"):
        upload(remote_of(store), folder)
    assert f"4/{MANIFEST}" not in store.names()


def test_a_damaged_local_checkpoint_does_not_get_into_the_store(tmp_path: Path, store: Bucket) -> None:
    folder = checkpoint(tmp_path, 4)
    flip(folder / WEIGHTS)
    with pytest.raises(DamagedError, match=f"{WEIGHTS} is damaged"):
        upload(remote_of(store), folder)
    assert f"4/{MANIFEST}" not in store.names()


def test_an_interrupted_upload_is_completed_without_sending_all_again(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path, 4)
    upload(remote_of(store), folder)
    store.remove(f"4/{MANIFEST}")
    store.remove("4/state.json")
    with through(lambda request, _: None, monkeypatch) as proxy:
        upload(remote_of(store), folder)
    assert whole(store, folder)
    assert not [one for one in proxy.requests if WEIGHTS in one and one.startswith("P")]


def test_another_checkpoint_of_the_step_is_replaced_and_never_mixed(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(remote_of(store), checkpoint(tmp_path / "a", 4, seed=1))
    store.change("4/optimizer-00007-of-00008.safetensors", b"of another layout")
    folder = checkpoint(tmp_path / "b", 4, seed=2)
    with through(lambda request, _: None, monkeypatch) as proxy:
        upload(remote_of(store), folder)
    assert whole(store, folder)
    changes = [one for one in proxy.requests if one.startswith(("P", "D"))]
    assert "?delete" in changes[0]  # the old manifest, before anything else
