"""Two ranks and an object store: rank 0 moves everything, both hear how it went."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pentode.checkpoint import remote
from pentode.checkpoint.folder import newest
from pentode.checkpoint.save import save
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


def environment() -> dict[str, str]:
    """What lets another process reach the store."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def save_and_send(*, root: str, url: str, environment: dict[str, str], refused: bool) -> None:
    """On each rank: save steps 1 and 2, send them; what rank 0 could not send is an error on both."""
    os.environ.update(environment)
    remote.LIMIT = 0.0
    folder, world = Path(root), everyone()
    place = Place(url, is_the_run=True, remove=True)
    with Copies(place, folder, world) as copies:
        copies.begin(fresh=False)
        copies.bring(last=10)
        copies.go_on()
        for step in (1, 2):
            save(folder, step=step, groups={}, state={}, files={"notes.txt": b"some"}, world=world)
            copies.after_save(folder)
        if not refused:
            copies.finish()
            return
        with pytest.raises(StorageError, match="checkpoint 2 is not in the store yet") as raised:
            copies.finish()
        assert raised.value.everywhere


def bring_back(*, root: str, url: str, environment: dict[str, str], steps: list[int]) -> None:
    """On each rank: the newest checkpoint of the store is in the run's folder, or in a borrowed one."""
    os.environ.update(environment)
    folder, world = Path(root), everyone()
    with Copies(Place(url, is_the_run=True, remove=True), folder, world) as copies:
        copies.begin(fresh=False)
        assert copies.bring(last=steps[-1]) == f"{url}/{steps[-1]}"
        assert newest(folder) is None
        assert copies.bring(last=10) is None
        found = newest(folder)
        assert found is not None
        assert found.step == steps[-1]
    for address, step in ((url, steps[-1]), (f"{url}/{steps[0]}", steps[0])):
        there = borrow(address, folder, world)
        assert (there.parent, there.name) == (folder / "from-s3", str(step))
        assert (there / "notes.txt").read_bytes() == b"some"
        give_back(folder, world)
        assert not there.parent.exists()
    with Copies(Place(url, is_the_run=False, remove=True), folder, world) as copies:
        with pytest.raises(ConfigError, match="--fresh") as raised:
            copies.begin(fresh=True)
        assert raised.value.everywhere


def test_rank_0_sends_and_both_ranks_hear_of_it(tmp_path: Path, store: Bucket) -> None:
    places = {"root": str(tmp_path / "run"), "url": store.url}
    with Proxy(lambda request, _: Fault(answer=500) if "PUT" in request and "/2/" in request else None) as proxy:
        through_proxy = {**environment(), "AWS_ENDPOINT_URL": proxy.url}
        run_on_ranks(save_and_send, 2, **places, environment=through_proxy, refused=True)
    assert store.published() == [1]
    run_on_ranks(save_and_send, 2, **places, environment=environment(), refused=False)
    assert store.published() == [1, 2]
    run_on_ranks(bring_back, 2, root=str(tmp_path / "new"), url=store.url, environment=environment(), steps=[1, 2])
