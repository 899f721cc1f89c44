"""The queue of checkpoints on their way to a store: what waits for what, what fails, what is removed."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pentode.checkpoint import upload
from pentode.checkpoint.retry import Clock, GivenUpError, PassingError, Patience
from pentode.checkpoint.upload import Uploader
from pentode.errors import StorageError
from tests.helpers.object_store import FakeTime

SOON = 30.0  # seconds that a test waits at most for what should happen at once


@dataclass
class Shop:
    """Stands for a Remote: takes checkpoints while it is open, refuses those in `refused`."""

    url: str = "s3://bucket/run"
    limit: float = 300.0
    clock: Clock = field(default_factory=Clock)
    refused: set[int] = field(default_factory=set)
    taken: list[int] = field(default_factory=list)
    with_hf: list[int] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)
    busy: threading.Event = field(default_factory=threading.Event)

    def patience(self, what: int | str = "") -> Patience:
        return Patience(f"{self.url}/{what}", clock=self.clock)

    def upload(self, folder: Path, patience: Patience, *, again: bool) -> bool:
        self.busy.set()
        while not self.open.wait(0.01):
            if patience.stop.is_set():
                raise StorageError("given up")
        self.limits.append(patience.limit)
        if not folder.exists():
            raise FileNotFoundError(folder)
        if int(folder.name) in self.refused:
            raise StorageError(f"{folder.name} is refused")
        self.taken.append(int(folder.name))
        return True

    def has(self, step: int, patience: Patience) -> bool:
        return step in self.taken

    def has_hf(self, step: int, patience: Patience) -> bool:
        return step in self.with_hf

    def send_hf(self, folder: Path, patience: Patience) -> None:
        self.with_hf.append(int(folder.name))

    def send_run_files(self, root: Path, patience: Patience) -> None:
        assert root.is_dir()


@pytest.fixture
def shop() -> Iterator[Shop]:
    made = Shop()
    yield made
    made.open.set()


def uploader(shop: Any, root: Path, **options: Any) -> Uploader:
    return Uploader(shop, root, remove=options.pop("remove", False), **options)


def send(made: Uploader, root: Path, *steps: int) -> None:
    """Save these, and have them sent."""
    for step in steps:
        saved(root, step)
    made.collect()
    assert made.wait(SOON)


def saved(root: Path, step: int) -> Path:
    folder = root / str(step)
    folder.mkdir()
    return folder


def test_a_place_is_free_while_no_more_than_so_many_wait(tmp_path: Path, shop: Shop) -> None:
    made = uploader(shop, tmp_path, places=2)
    for step in (1, 2, 3):  # one is sent, two wait
        assert made.has_place()
        saved(tmp_path, step)
        made.collect()
    assert shop.busy.wait(SOON)
    assert not made.has_place()
    shop.open.set()
    assert made.has_place(within=SOON)
    assert made.wait(SOON)
    assert shop.taken == [1, 2, 3]
    assert made.unsent() == []
    made.close()


def test_what_fails_stays_and_is_tried_with_the_next_one_but_not_long(tmp_path: Path, shop: Shop) -> None:
    shop.open.set()
    shop.refused = {1, 2}
    made = uploader(shop, tmp_path, remove=True)
    for step in (1, 2):
        saved(tmp_path, step)
        made.collect()
        assert made.wait(SOON)
    assert sorted(made.failed) == made.unsent() == [1, 2]
    assert "1 is refused" in made.failed[1]
    assert (tmp_path / "1").is_dir()
    assert shop.limits == [300.0, 0.0, 0.0]  # 1; then 1 again and 2, in one try each
    shop.refused = set()
    saved(tmp_path, 3)
    made.collect()
    assert made.wait(SOON)
    assert shop.taken == [1, 2, 3]
    assert shop.limits[3:] == [0.0, 300.0, 300.0]
    assert list(tmp_path.iterdir()) == []
    made.close()


def test_the_last_try_is_patient_again(tmp_path: Path, shop: Shop) -> None:
    shop.open.set()
    shop.refused = {1}
    saved(tmp_path, 1)
    made = uploader(shop, tmp_path)
    made.collect()
    assert made.wait(SOON)
    made.try_all_again()
    assert made.wait(SOON)
    assert shop.limits == [300.0, 300.0]
    made.close()


def test_a_local_copy_is_removed_only_when_asked_and_sent(tmp_path: Path, shop: Shop) -> None:
    shop.open.set()
    saved(tmp_path, 1)
    keeps = uploader(shop, tmp_path)
    keeps.collect()
    assert keeps.wait(SOON)
    assert (tmp_path / "1").is_dir()
    keeps.close()
    removes = uploader(shop, tmp_path, remove=True, fetched=1)
    removes.collect()
    assert removes.wait(SOON)
    assert not (tmp_path / "1").exists()
    assert shop.taken == [1]  # not again: it has just come from the store
    removes.close()


def test_a_checkpoint_that_was_pruned_while_it_waited_is_no_problem(tmp_path: Path, shop: Shop) -> None:
    saved(tmp_path, 1)
    folder = saved(tmp_path, 2)
    made = uploader(shop, tmp_path)
    made.collect()
    assert shop.busy.wait(SOON)
    folder.rmdir()
    shop.open.set()
    assert made.wait(SOON)
    assert shop.taken == [1]
    assert made.unsent() == []
    made.close()


class Maker:
    """Stands for who makes Hugging Face folders: when it is told to, or says that it cannot."""

    def __init__(self, root: Path) -> None:
        self.root, self.cannot = root, set[int]()
        self.asked = threading.Event()

    def to_come(self, step: int) -> bool:
        assert (self.root / str(step)).is_dir()
        self.asked.set()
        return step not in self.cannot and not (self.root / "hf" / str(step)).is_dir()

    def make(self, step: int) -> None:
        (self.root / "hf" / str(step)).mkdir(parents=True)


def test_local_copies_stay_until_their_hugging_face_folders_are_sent_and_hold_up_no_checkpoint(
    tmp_path: Path, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "TICK", 0.01)
    shop.open.set()
    for step in (1, 2, 3):
        saved(tmp_path, step)
    shop.with_hf = [3]  # is there since an earlier start
    maker = Maker(tmp_path)
    made = uploader(shop, tmp_path, remove=True, hf_to_come=maker.to_come)
    made.collect()
    assert made.wait(SOON)
    assert shop.taken == [1, 2, 3]
    assert made.has_place()
    assert (made.unsent(), made.needed()) == ([], [1, 2])
    assert maker.asked.wait(SOON)
    maker.make(2)
    while made.needed() != [1]:
        maker.asked.clear()
        assert maker.asked.wait(SOON)
    saved(tmp_path, 4)
    made.collect()
    assert made.wait(SOON)
    assert shop.taken[-1] == 4
    assert not made.wait(0.0, folders=True)
    maker.cannot = {1, 4}
    assert made.wait(SOON, folders=True)
    assert shop.with_hf == [3, 2]
    assert not [path for path in tmp_path.rglob("*") if path.name != "hf"]
    made.close()


def test_a_run_that_ends_before_the_hugging_face_folder_is_made_keeps_the_local_copy(
    tmp_path: Path, shop: Shop
) -> None:
    shop.open.set()
    saved(tmp_path, 1)
    maker = Maker(tmp_path)
    made = uploader(shop, tmp_path, remove=True, hf_to_come=maker.to_come)
    made.collect()
    assert made.wait(SOON)
    assert maker.asked.wait(SOON)
    made.close()
    assert not made._thread.is_alive()
    assert (tmp_path / "1").is_dir()


def test_a_folder_that_cannot_be_sent_is_told_and_stays(
    tmp_path: Path, shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(folder: Path, patience: Patience) -> None:
        raise StorageError("no room")

    monkeypatch.setattr(shop, "send_hf", refuse)
    shop.open.set()
    saved(tmp_path, 1)
    maker = Maker(tmp_path)
    maker.make(1)
    made = uploader(shop, tmp_path, remove=True, hf_to_come=maker.to_come)
    made.collect()
    assert made.wait(SOON, folders=True)
    assert f"no room; {tmp_path}/hf/1 is not in the store" in capsys.readouterr().out
    assert (tmp_path / "1").is_dir()
    assert made.needed() == [1]
    monkeypatch.undo()
    made.try_all_again()
    assert made.wait(SOON, folders=True)
    assert made.needed() == []
    assert shop.with_hf == [1]
    assert not (tmp_path / "1").exists()
    made.close()


def test_what_is_under_way_at_the_end_is_patient_and_so_are_those_after_it(tmp_path: Path, shop: Shop) -> None:
    shop.refused = {1}
    saved(tmp_path, 1)
    made = uploader(shop, tmp_path)
    made.collect()
    assert shop.busy.wait(SOON)
    shop.open.set()
    assert made.wait(SOON)
    shop.open.clear()
    shop.busy.clear()
    saved(tmp_path, 2)
    made.collect()
    assert shop.busy.wait(SOON)  # 1 again, in one try
    made.try_all_again()
    shop.open.set()
    assert made.wait(SOON)
    made.close()
    assert shop.limits == [300.0, 300.0, 300.0]


def test_what_was_pruned_from_the_store_waits_for_no_folder(
    tmp_path: Path, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "TICK", 0.01)
    shop.open.set()
    maker = Maker(tmp_path)
    made = uploader(shop, tmp_path, remove=True, hf_to_come=maker.to_come, sent=lambda step, _: {step - 1})
    send(made, tmp_path, 1, 2)
    assert made.needed() == [2]
    assert not (tmp_path / "1").exists()
    maker.make(2)
    assert made.wait(SOON, folders=True)
    made.close()


def test_no_more_than_some_wait_for_folders_on_a_staging_disk(
    tmp_path: Path, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "FOLDERS", 1)
    shop.open.set()
    maker = Maker(tmp_path)
    made = uploader(shop, tmp_path, remove=True, hf_to_come=maker.to_come)
    send(made, tmp_path, 1)
    assert made.has_place()
    send(made, tmp_path, 2)
    assert not made.has_place()
    made.close()


@pytest.mark.parametrize("error", [StorageError("no"), KeyError("a bug")])
def test_what_follows_a_sent_checkpoint_may_fail_and_is_told(
    tmp_path: Path, shop: Shop, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    shop.open.set()
    sent: list[int] = []

    def follow(step: int, patience: Patience) -> set[int]:
        sent.append(step)
        raise error

    made = uploader(shop, tmp_path, sent=follow)
    for step in (1, 2):
        saved(tmp_path, step)
        made.collect()
        assert made.wait(SOON)
    made.close()
    assert sent == [1, 2]
    assert made.unsent() == []
    assert "; older checkpoints could not be removed" in capsys.readouterr().out


def test_closing_gives_up_what_is_under_way(tmp_path: Path, shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        saved(tmp_path, step)
    made = uploader(shop, tmp_path, remove=True)
    made.collect()
    assert shop.busy.wait(SOON)
    assert not made.wait(0.0)
    made.close()
    assert not made._thread.is_alive()
    assert shop.taken == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    assert capsys.readouterr().out == ""


def failing(times: int) -> Any:
    left = [times]

    def call() -> str:
        if left[0]:
            left[0] -= 1
            raise PassingError("it is busy")
        return "done"

    return call


def test_waits_grow_to_a_limit_and_end_with_success() -> None:
    time = FakeTime()
    patience = Patience("work", limit=1e6, clock=Clock(time.now, time.wait))
    assert patience.call(failing(12)) == "done"
    assert patience.retries == len(time.waits) == 12
    for number, wait in enumerate(time.waits):
        assert 0.5 <= wait / min(0.5 * 2**number, 30.0) <= 1.0


def test_failing_is_added_up_over_the_work_and_bounded() -> None:
    time = FakeTime()
    patience = Patience("work", limit=60.0, clock=Clock(time.now, time.wait))
    for _ in range(8):
        assert patience.call(failing(4)) == "done"  # 3.75 to 7.5 s each
        assert time.time < 60.0
    with pytest.raises(GivenUpError, match=r"it is busy, for \d+ s"):
        patience.call(failing(1000))
    assert 60.0 <= time.time <= 90.0


def test_nobody_is_patient_after_being_told_to_stop() -> None:
    time = FakeTime()
    patience = Patience("work", clock=Clock(time.now, time.wait))
    patience.stop.set()
    with pytest.raises(GivenUpError, match="told to stop"):
        patience.call(failing(0))
