"""Checkpoints fetched from an object store, and which of the two sides' a run goes on from."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pentode.checkpoint import storage
from pentode.checkpoint.folder import DamagedError, newest
from pentode.checkpoint.manifest import MANIFEST
from pentode.checkpoint.remote import bring_newest
from pentode.errors import CheckpointError, StorageError
from tests.helpers.object_store import Bucket
from tests.helpers.sent import (
    WEIGHTS,
    bucket_in_parts,
    checkpoint,
    contents,
    fetch,
    flip,
    flip_object,
    remote_of,
    upload,
)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket, into which files of more than 16 KiB go in parts."""
    with bucket_in_parts(monkeypatch) as made:
        yield made


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


def test_an_older_one_is_refused_where_the_config_says_stop(tmp_path: Path, store: Bucket) -> None:
    remote = remote_of(store)
    for step in (4, 8):
        upload(remote, checkpoint(tmp_path / "there", step))
    flip_object(store, f"8/{WEIGHTS}")
    before = store.names()
    with pytest.raises(CheckpointError, match="restore it from a copy"):
        bring_newest(tmp_path / "new", remote, fallback=False)
    assert store.names() == before


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
