"""The room that a run asks for on its disk, by how many checkpoints may really stand there while a store takes them."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from pentode.checkpoint.save import save
from pentode.checkpoint.upload import FOLDERS, PLACES, Uploader
from pentode.errors import StorageError
from pentode.train import saving
from pentode.train.saving import check_room
from pentode.train.state import TrainState, content
from tests.helpers.steps import tiny_run
from tests.unit.test_s3_upload import SOON, Maker, Shop, saved

URL = "s3://bucket/run"
STAGED = {"checkpoints__checkpoints_path": URL}
COPIED = {"s3_upload": {"upload_s3_path": URL, "remove_after_upload": False}}
SENT_AWAY = {"s3_upload": {"upload_s3_path": URL, "remove_after_upload": True}}
WITH_HF, KEEP = {"checkpoints__save_hf": True}, {"checkpoints__keep_last": 2}


def most_at_once(root: Path, shop: Any, *, folders: bool) -> int:
    """How many checkpoints stand in `root`, the one that is saved among them, when uploads come to a halt."""
    made = Uploader(shop, root, remove=True, hf_to_come=Maker(root).to_come if folders else None)
    if folders:
        shop.open.set()
        for step in range(FOLDERS):  # are sent, and their Hugging Face folders never made
            saved(root, step)
            made.collect()
            assert made.wait(SOON)
        shop.open.clear()
    for step in range(FOLDERS, 100):
        if not made.has_place():
            break
        saved(root, step)
        made.collect()
    made.close()
    return len(list(root.iterdir()))


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 2),
        (KEEP, 3),
        (STAGED, 3),
        (STAGED | KEEP, 3),
        (STAGED | WITH_HF, 7),
        (SENT_AWAY, 3),
        (SENT_AWAY | WITH_HF, 7),
        (COPIED, 2),
        (COPIED | KEEP, 5),
    ],
    ids=str,
)
def test_room_is_asked_for_as_many_checkpoints_as_may_stand_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], count: int
) -> None:
    run = tiny_run(tmp_path, checkpoints__checkpoint_interval=1, **changes)
    root, free, real = tmp_path / "disk", [0], shutil.disk_usage(tmp_path)
    root.mkdir()
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: real._replace(free=free[0]))
    with pytest.raises(StorageError) as raised:
        check_room(run, TrainState(), root)
    told = re.search(
        r"checkpoints of ([0-9,]+) bytes, (\d) more of which must fit at a time"
        r"( with Hugging Face folders of ([0-9,]+))?",
        str(raised.value),
    )
    assert told is not None
    size = int(told[1].replace(",", ""))
    beside = int((told[4] or "0").replace(",", ""))
    assert bool(beside) == (changes.items() >= WITH_HF.items())
    assert int(told[2]) == count
    assert f"checkpoints.{'staging' if changes.items() >= STAGED.items() else 'checkpoints'}_path" in str(raised.value)

    free[0] = count * (size + beside)
    check_room(run, TrainState(), root)
    free[0] -= 1
    with pytest.raises(StorageError, match=f", {count} more of which"):
        check_room(run, TrainState(), root)
    folder = save(root, **content(run, TrainState()))
    check_room(run, TrainState(), root)  # one is there
    assert sum(path.stat().st_size for path in folder.iterdir()) == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize(("folders", "count"), [(False, PLACES + 1), (True, PLACES + FOLDERS + 1)])
def test_as_many_really_stand_there(tmp_path: Path, folders: bool, count: int) -> None:
    shop = Shop()
    assert most_at_once(tmp_path, shop, folders=folders) == count
    shop.open.set()
