"""Checkpoints sent to an object store and fetched: manifest last, everything read back, whatever fails on the way."""

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pentode.checkpoint import objects, storage
from pentode.checkpoint.folder import DamagedError, newest
from pentode.checkpoint.layout import Saved
from pentode.checkpoint.manifest import MANIFEST
from pentode.checkpoint.remote import Remote, bring_newest
from pentode.checkpoint.retry import Clock
from pentode.checkpoint.save import save
from pentode.errors import CheckpointError, StorageError
from tests.helpers.object_store import Bucket, FakeTime, Fault, Plan, Proxy, bucket, smaller_parts

KIB = 2**10
WEIGHTS = "weights-00000-of-00001.safetensors"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket, into which files of more than 16 KiB go in parts."""
    monkeypatch.setattr(objects, "PART", 16 * KIB)
    smaller_parts(monkeypatch)
    with bucket(monkeypatch) as made:
        yield made


def checkpoint(root: Path, step: int, *, kib: int = 40, seed: int = 0) -> Path:
    """A checkpoint of one tensor of so many KiB."""
    tensor = torch.randn(kib * KIB // 4, generator=torch.Generator().manual_seed(seed))
    groups = {"weights": {"w": Saved((len(tensor),), [((0,), tensor)])}}
    return save(root, step=step, groups=groups, state={"train": {"consumed_samples": step}})


def remote_of(store: Bucket, time: FakeTime | None = None, **more: float) -> Remote:
    """The store, with a clock that nobody waits for."""
    time = time or FakeTime()
    return Remote(store.url, clock=Clock(time.now, time.wait), **more)


def upload(remote: Remote, folder: Path) -> None:
    remote.upload(folder, remote.patience(folder.name))


def fetch(remote: Remote, step: int, root: Path) -> Path | None:
    return remote.fetch(step, root, remote.patience(step))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def whole(store: Bucket, folder: Path) -> bool:
    """Whether the store has this checkpoint, all of it, bit for bit."""
    return {name.split("/")[1]: store.read(name) for name in store.names()} == contents(folder)


def through(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """A proxy that new connections go through."""
    proxy = Proxy(plan)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    return proxy


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


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)


def flip_object(store: Bucket, name: str) -> None:
    data = bytearray(store.read(name))
    data[-5] ^= 16
    store.change(name, bytes(data))


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


@pytest.mark.parametrize("name", [WEIGHTS, "state.json"])
def test_what_is_fetched_is_compared(tmp_path: Path, store: Bucket, name: str) -> None:
    remote = remote_of(store)
    upload(remote, checkpoint(tmp_path / "a", 4))
    flip_object(store, f"4/{name}")
    with pytest.raises(DamagedError, match=f"runs/a/4/{name}: it is damaged, its checksum is wrong"):
        fetch(remote, 4, tmp_path / "b")
    store.change(f"4/{name}", store.read(f"4/{name}")[:-1])
    with pytest.raises(DamagedError, match="bytes, not"):
        fetch(remote, 4, tmp_path / "b")
    store.remove(f"4/{name}")
    with pytest.raises(DamagedError, match="it is not there"):
        fetch(remote, 4, tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []


@pytest.mark.parametrize("bad", ["../evil", "/etc/evil", "a/b", "A", ""])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, store: Bucket, bad: str) -> None:
    remote = remote_of(store)
    upload(remote, checkpoint(tmp_path / "a", 4))
    text = store.read(f"4/{MANIFEST}").decode().replace('"state.json"', f'"{bad}"')
    store.change(f"4/{MANIFEST}", text.encode())
    with pytest.raises(DamagedError, match="it lists a file named"):
        fetch(remote, 4, tmp_path / "b")
    assert not (tmp_path / "evil").exists()


def test_the_newest_of_both_sides_is_gone_on_with(tmp_path: Path, store: Bucket) -> None:
    remote, root = remote_of(store), tmp_path / "here"
    for step in (4, 8):
        upload(remote, checkpoint(tmp_path / "there", step))
    checkpoint(root, 4)
    assert bring_newest(root, remote) == 8
    assert newest(root) is not None
    checkpoint(root, 12)
    assert bring_newest(root, remote) is None
    assert sorted(path.name for path in root.iterdir() if path.name.isdigit()) == ["12", "4", "8"]


def test_a_step_without_a_manifest_is_not_there(tmp_path: Path, store: Bucket) -> None:
    remote = remote_of(store)
    for step in (4, 8):
        upload(remote, checkpoint(tmp_path / "there", step))
    store.remove(f"8/{MANIFEST}")
    assert bring_newest(tmp_path, remote) == 4
    store.remove(f"4/{MANIFEST}")
    assert bring_newest(tmp_path / "new", remote) is None


def test_a_damaged_one_costs_a_line_and_is_set_aside(
    tmp_path: Path, store: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    remote = remote_of(store)
    for step in (4, 8):
        upload(remote, checkpoint(tmp_path / "there", step))
    flip_object(store, f"8/{WEIGHTS}")
    assert bring_newest(tmp_path / "new", remote) == 4
    assert f"/8/{WEIGHTS}: it is damaged, its checksum is wrong; going on from step 4" in capsys.readouterr().out
    assert f"8/{MANIFEST}" not in store.names()
    assert f"8/{WEIGHTS}" in store.names()
    assert [name for name in store.names() if re.fullmatch(rf"8/bad-[0-9a-f]{{8}}-{MANIFEST}", name)]


def test_a_damaged_local_one_is_replaced_by_the_stores(tmp_path: Path, store: Bucket) -> None:
    remote, root = remote_of(store), tmp_path / "here"
    folder = checkpoint(root, 4)
    upload(remote, folder)
    expected = contents(folder)
    flip(folder / WEIGHTS)
    assert bring_newest(root, remote) == 4
    assert contents(root / "4") == expected
    assert len(list(root.glob(".bad-4-*"))) == 1


def test_damaged_ones_and_no_good_one_stop_the_run_and_are_left_as_they_are(tmp_path: Path, store: Bucket) -> None:
    remote, root = remote_of(store), tmp_path / "here"
    upload(remote, checkpoint(tmp_path / "there", 8))
    flip_object(store, f"8/{WEIGHTS}")
    flip(checkpoint(root, 4) / WEIGHTS)
    before = store.names(), sorted(root.iterdir())
    with pytest.raises(CheckpointError, match="no older checkpoint in"):
        bring_newest(root, remote)
    assert before == (store.names(), sorted(root.iterdir()))


def test_a_full_disk_leaves_nothing_half_fetched(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = remote_of(store)
    upload(remote, checkpoint(tmp_path / "there", 8))

    def full(path: Path, pieces: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(storage, "write", full)
    with pytest.raises(StorageError, match=r"the disk is full \([\d,]+ bytes are needed"):
        fetch(remote, 8, tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []


def test_what_an_interrupted_upload_left_is_dropped_at_the_start(tmp_path: Path, store: Bucket) -> None:
    store.begin_upload(f"40/{WEIGHTS}")
    store.begin_upload("40/Somebody Else's")
    remote_of(store).prepare()
    assert store.unfinished() == 1
    assert store.names() == []


def test_a_long_listing_is_read_to_its_end(store: Bucket) -> None:
    remote = remote_of(store)
    for number in range(1100):
        store.change(f"{number}/{MANIFEST}", b"")
    assert remote.steps(remote.patience()) == list(range(1099, -1, -1))
    remote.remove_run()
    assert store.names() == []
