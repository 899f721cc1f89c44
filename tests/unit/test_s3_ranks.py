"""Two ranks and an object store: rank 0 moves everything, both hear how it went."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pentode.checkpoint import remote
from pentode.checkpoint.folder import newest
from pentode.checkpoint.save import save
from pentode.dist.collectives import wait_for_all
from pentode.dist.mesh import everyone
from pentode.errors import ConfigError, StorageError
from pentode.train.copies import Copies, Place, borrow, give_back
from tests.helpers.object_store import Bucket, Fault, Proxy, bucket
from tests.helpers.spawn import run_on_ranks


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket."""
    with bucket(monkeypatch) as made:
        yield made


def send_and_bring_back(*, root: str, url: str, through: dict[str, str], directly: dict[str, str]) -> None:
    """On each rank: steps 1 and 2 are saved and sent, the second in another try; then they come back."""
    remote.LIMIT = 0.0
    world = everyone()
    os.environ.update(through)
    with sending(Path(root), url) as copies:
        with pytest.raises(StorageError, match="checkpoint 2 is not in the store yet") as raised:
            copies.finish()
        assert raised.value.everywhere
    os.environ.update(directly)
    with sending(Path(root), url) as copies:
        copies.finish()

    folder = Path(f"{root}-new")
    folder.mkdir(exist_ok=True)
    with Copies(Place(url, is_the_run=True, remove=True), folder, world) as copies:
        copies.begin(fresh=False)
        assert copies.bring(last=2) == f"{url}/2"
        assert newest(folder) is None
        wait_for_all()  # before the first rank brings something
        assert copies.bring(last=10) is None
        found = newest(folder)
        assert found is not None
        assert found.step == 2
    for address, step in ((url, 2), (f"{url}/1", 1)):
        there = borrow(address, folder, world)
        assert (there.parent, there.name) == (folder / "from-s3", str(step))
        assert (there / "notes.txt").read_bytes() == b"some"
        give_back(folder, world)
        assert not there.parent.exists()
        wait_for_all()  # before the first rank borrows again
    with Copies(Place(url, is_the_run=False, remove=True), folder, world) as copies:
        with pytest.raises(ConfigError, match="--fresh") as refused:
            copies.begin(fresh=True)
        assert refused.value.everywhere


@contextmanager
def sending(root: Path, url: str) -> Iterator[Copies]:
    """Save two steps and have them sent."""
    world = everyone()
    with Copies(Place(url, is_the_run=True, remove=True), root, world) as copies:
        copies.begin(fresh=False)
        copies.bring(last=10)
        copies.go_on()
        for step in (1, 2):
            save(root, step=step, groups={}, state={}, files={"notes.txt": b"some"}, world=world)
            copies.after_save(root)
        yield copies


def test_rank_0_sends_and_both_ranks_hear_of_it(tmp_path: Path, store: Bucket) -> None:
    with Proxy(lambda request, _: Fault(answer=500) if "PUT" in request and "/2/" in request else None) as proxy:
        directly = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        through = {**directly, "AWS_ENDPOINT_URL": proxy.url}
        root = str(tmp_path / "run")
        run_on_ranks(send_and_bring_back, 2, root=root, url=store.url, through=through, directly=directly)
    assert proxy.faults > 0
    assert store.published() == [1, 2]
