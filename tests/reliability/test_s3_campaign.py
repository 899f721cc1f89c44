"""Failures of an object store by the hundred: dropped connections, kills in mid-upload, damages, 10,000 keys."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pentode.checkpoint.folder import newest
from pentode.checkpoint.manifest import MANIFEST, Manifest
from pentode.checkpoint.remote import bring_newest
from pentode.errors import CheckpointError
from tests.helpers.kill_run import Command, exit_code
from tests.helpers.object_store import Bucket, Fault, Gate, Proxy, bucket, pentode_in_parts
from tests.helpers.sent import bucket_in_parts, checkpoint, contents, fetch, remote_of, upload, whole
from tests.helpers.tiny import tiny_yaml, weights

pytestmark = pytest.mark.long

DROPS = 100
KILLS = 50
DAMAGES = 300
KEYS = 10_000
REQUESTS = 30  # about as many as an upload and a fetch of `checkpoint` make
CHANGES = 14  # requests that change the store, of those that one checkpoint of the tiny run takes: 14 or a few more
FINAL = "weights-00000-of-00001.safetensors"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket, into which files of more than 16 KiB go in parts."""
    with bucket_in_parts(monkeypatch) as made:
        yield made


def test_a_hundred_connections_dropped_at_any_byte(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, drops, direct = random.Random(1), 0, os.environ["AWS_ENDPOINT_URL"]
    while drops < DROPS:
        step = 1000 + drops
        folder, number, at = checkpoint(tmp_path / "here", step, seed=step), draw.randrange(REQUESTS), draw.random()
        fault = Fault(sent=at) if draw.random() < 0.5 else Fault(received=at)

        def plan(request: str, count: int, number: int = number, fault: Fault = fault) -> Fault | None:
            return fault if count == number else None

        with Proxy(plan) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            remote = remote_of(store)
            upload(remote, folder)
            fetched = fetch(remote, step, tmp_path / "there")
        monkeypatch.setenv("AWS_ENDPOINT_URL", direct)
        assert fetched is not None
        assert contents(fetched) == contents(folder)
        assert step in store.published()
        remote_of(store).remove_run()
        drops += proxy.faults
    print(f"{drops} connections dropped, {step - 999} checkpoints sent and fetched, all whole")


def test_requests_that_fail_at_random_change_nothing(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, folder = random.Random(2), checkpoint(tmp_path / "here", 4)
    answers = [(500, "InternalError"), (503, "SlowDown"), (429, "Throttling"), (500, "500")]

    def plan(request: str, count: int) -> Fault | None:
        if draw.random() < 0.5:
            return None
        status, code = draw.choice(answers)
        return Fault(answer=status, code=code)

    faults = 0
    for attempt in range(10):
        with Proxy(plan) as proxy, monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", proxy.url)
            remote = remote_of(store, limit=1e9)
            upload(remote, folder)
            assert fetch(remote, 4, tmp_path / str(attempt)) is not None
        faults += proxy.faults
        assert whole(store, folder)
        remote_of(store).remove_run()
    print(f"{faults} answers of 500, 503 and 429 in 10 uploads and fetches, all whole")


def test_fifty_kills_in_mid_upload_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = tmp_path / "plain"
    plain.mkdir()
    draw, kills, runs = random.Random(3), 0, 0
    while kills < KILLS:
        with bucket_in_parts(monkeypatch) as store:
            file = tiny_yaml(
                plain, checkpoints__checkpoints_path=store.url, checkpoints__staging_path=str(tmp_path / str(runs))
            )
            known = 0
            for attempt in range(1000):
                gate = Gate(
                    "^(PUT|POST|DELETE) .*/runs/a/[0-9]", draw.randrange(2 * CHANGES) if kills < KILLS else 10**9
                )
                with Proxy(gate) as proxy:
                    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
                    arguments = [environment | {"AWS_ENDPOINT_URL": proxy.url}, "train", str(file)]
                    root = tmp_path / f"log-{runs}-{attempt}"
                    process = Command(pentode_in_parts, lambda root, words=arguments: words).start(root)
                    while process.is_alive() and not gate.reached.is_set():
                        gate.reached.wait(0.01)
                    if gate.reached.is_set():
                        process.kill()
                    code = exit_code(process)
                gate.opened.set()
                newest_here = max([0, *store.published(), *local_steps(tmp_path / str(runs))])
                assert newest_here >= known, f"step {known} is gone:\n{output(root)}"
                known = newest_here
                if code == 0:
                    break
                assert code == -signal.SIGKILL, f"{root} ended with {code}:\n{output(root)}"
                kills += 1
            assert store.unfinished() == 0
            assert store.published()[-1] == 12
            assert store.read(f"12/{FINAL}") == expected(tmp_path)
            runs += 1
    print(f"{kills} kills in an upload, {runs} runs, all with the same last bytes")


def output(root: Path) -> str:
    """What a process printed."""
    log = root.with_name(root.name + ".log")
    return log.read_text(errors="replace") if log.exists() else ""


def local_steps(root: Path) -> list[int]:
    return [int(path.name) for path in root.iterdir() if path.name.isdigit()] if root.is_dir() else []


def expected(folder: Path) -> bytes:
    """The weights at the end of the same run without a store."""
    plain = folder / "without"
    if not plain.exists():
        plain.mkdir()
        command = Command(pentode_in_parts, lambda root: [{}, "train", str(tiny_yaml(plain))])
        assert exit_code(command.start(plain / "log")) == 0, output(plain / "log")
    return weights(plain / "run", 12)


def test_no_damage_in_the_store_is_gone_on_with(tmp_path: Path, store: Bucket) -> None:
    draw, remote = random.Random(4), remote_of(store)
    good = {step: contents(checkpoint(tmp_path / "here", step, kib=8, seed=step)) for step in (4, 8)}
    fell_back = 0

    def restore() -> None:
        for step, files in good.items():
            for name, data in files.items():
                store.change(f"{step}/{name}", data)

    for number in range(DAMAGES):
        restore()
        damage(store, f"8/{draw.choice(sorted(good[8]))}", draw)
        root = tmp_path / f"there-{number}"
        bring_newest(root, remote)
        found = newest(root)
        assert found is not None
        there, as_saved = contents(found.folder), dict(good[found.step])
        assert Manifest.parse(there.pop(MANIFEST)) == Manifest.parse(as_saved.pop(MANIFEST))
        assert there == as_saved, f"damage {number} was not noticed"
        fell_back += found.step == 4
    print(f"{DAMAGES} damages in the store, {fell_back} times an older checkpoint was taken, 0 silent")
    assert fell_back > 0.9 * DAMAGES
    restore()
    for step in good:
        damage(store, f"{step}/{FINAL}", draw)
    with pytest.raises(CheckpointError):
        bring_newest(tmp_path / "none", remote)


def damage(store: Bucket, name: str, draw: random.Random) -> None:
    """Flip a bit, cut the end off, empty, remove, or overwrite a stretch with zeros."""
    data = bytearray(store.read(name))
    kind = draw.randrange(5)
    if kind == 0:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[draw.randrange(len(data)) :]
    elif kind == 2:
        data.clear()
    elif kind == 3:
        store.remove(name)
        return
    else:
        start = draw.randrange(len(data))
        data[start : start + 64] = bytes(len(data[start : start + 64]))
    store.change(name, bytes(data))


def test_ten_thousand_keys_are_listed_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    with bucket(monkeypatch) as store:
        remote = remote_of(store)
        for number in range(KEYS):
            store.change(f"{number}/{MANIFEST}", b"")
        assert remote.steps(remote.patience()) == list(range(KEYS - 1, -1, -1))
        assert len(remote.objects.under(remote.patience())) == KEYS
        remote.remove_run()
        assert store.names() == []
