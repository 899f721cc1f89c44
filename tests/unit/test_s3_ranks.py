"""Two ranks and an object store: rank 0 moves everything, both hear how it went."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pentode.checkpoint import remote, upload
from pentode.checkpoint.folder import newest
from pentode.checkpoint.save import save
from pentode.dist.collectives import wait_for_all
from pentode.dist.mesh import everyone
from pentode.errors import ConfigError, StorageError
from pentode.train import copies as copies_module
from pentode.train.copies import Copies, Place, borrow, give_back
from pentode.train.signals import StopSignal
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
            copies.after_save()
        yield copies


def test_rank_0_sends_and_both_ranks_hear_of_it(tmp_path: Path, store: Bucket) -> None:
    with Proxy(lambda request, _: Fault(answer=500) if "PUT" in request and "/2/" in request else None) as proxy:
        directly = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        through = {**directly, "AWS_ENDPOINT_URL": proxy.url}
        root = str(tmp_path / "run")
        run_on_ranks(send_and_bring_back, 2, root=root, url=store.url, through=through, directly=directly)
    assert proxy.faults > 0
    assert store.published() == [1, 2]


def wait_until_one_is_to_stop(*, root: str, url: str, through: dict[str, str]) -> None:
    """On each rank: more is saved than can be sent, until a signal comes to the second."""
    world = everyone()
    os.environ.update(through)
    stop = StopSignal(torch.device("cpu"))
    stop.patient = True
    upload.FAREWELL = 0.0
    with Copies(Place(url, is_the_run=True, remove=True), Path(root), world) as copies:
        copies.begin(fresh=False)
        copies.bring(last=10)
        for step in (1, 2, 3):
            copies.wait_for_place(step, stop)
            assert stop.asked is None
            save(Path(root), step=step, groups={}, state={}, files={"notes.txt": b"some"}, world=world)
            copies.after_save()
        if world.rank == 1:
            stop._note(signal.SIGTERM, None)
        copies.wait_for_place(4, stop)
        assert stop.asked == signal.SIGTERM
        assert copies.waited == 0.0
        stop.asked = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(copies_module, "TICK", 0.01)
            patch.setattr(copies_module, "LONGEST_WAIT", 0.1)
            copies.wait_for_place(4, stop)
        assert stop.asked is None
        assert (copies.waited > 0.0) == (world.rank == 0)


def test_all_ranks_wait_for_a_place_and_a_signal_to_one_of_them_ends_that(tmp_path: Path, store: Bucket) -> None:
    hold = threading.Event()
    stuck = lambda request, _: Fault(held=hold) if request.startswith("PUT") and "/1/" in request else None  # noqa: E731
    with Proxy(stuck) as proxy:
        through = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        through["AWS_ENDPOINT_URL"] = proxy.url
        try:
            run_on_ranks(wait_until_one_is_to_stop, 2, root=str(tmp_path), url=store.url, through=through)
        finally:
            hold.set()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["1", "2", "3"]
