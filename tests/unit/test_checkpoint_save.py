"""What saving promises: the same bytes for the same content, and the old checkpoint or the new one, whatever fails."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pentode.checkpoint import storage
from pentode.checkpoint.folder import newest, open_checkpoint
from pentode.checkpoint.layout import Saved
from pentode.checkpoint.load import read_tensors
from pentode.checkpoint.save import clean, remove_run, save
from pentode.errors import StorageError
from tests.helpers.faulty_os import Crash, FaultyOs, RecordingOs, after_power_loss


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "os", FaultyOs())


def write(root: Path, step: int, *, value: float | None = None) -> Path:
    tensor = torch.full((3, 5), float(step) if value is None else value)
    groups = {"weights": {"w": Saved.whole(tensor.bfloat16())}, "optimizer": {"exp_avg/w": Saved.whole(tensor)}}
    return save(root, step=step, groups=groups, state={"updates": step}, files={"config.yaml": b"general: {}\n"})


def held(root: Path) -> tuple[int, float]:
    """The newest checkpoint's step and the value of its weights, all of them read and proven."""
    checkpoint = newest(root)
    assert checkpoint is not None
    weights, moments = torch.empty(3, 5, dtype=torch.bfloat16), torch.empty(3, 5)
    read_tensors(checkpoint, "weights", {"w": Saved.whole(weights)})
    read_tensors(checkpoint, "optimizer", {"exp_avg/w": Saved.whole(moments)})
    assert torch.equal(weights.float(), moments)
    assert torch.equal(moments, moments[0, 0].expand(3, 5))
    return checkpoint.step, moments[0, 0].item()


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    assert content(write(tmp_path / "a", 4)) == content(write(tmp_path / "b", 4))


def test_a_folder_holds_the_files_that_were_promised(tmp_path: Path) -> None:
    folder = write(tmp_path / "runs" / "a", 4)
    assert folder == tmp_path / "runs" / "a" / "4"
    assert names(folder) == [
        "config.yaml",
        "manifest.json",
        "optimizer-00000-of-00001.safetensors",
        "state.json",
        "weights-00000-of-00001.safetensors",
    ]
    assert names(folder.parent) == ["4", "latest.txt"]
    assert (folder.parent / "latest.txt").read_text() == "4\n"
    assert open_checkpoint(folder).state == {"updates": 4, "step": 4, "format_version": 1}


def test_modes_are_what_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = write(tmp_path, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


def test_a_valid_checkpoint_of_the_same_content_is_kept(tmp_path: Path) -> None:
    inode = write(tmp_path, 1).stat().st_ino
    assert write(tmp_path, 1).stat().st_ino == inode
    assert names(tmp_path) == ["1", "latest.txt"]


def test_a_checkpoint_of_the_same_step_and_other_content_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 1, value=7.0)
    write(tmp_path, 1, value=8.0)
    assert held(tmp_path) == (1, 8.0)
    assert names(tmp_path) == ["1", "latest.txt"]


def test_a_damaged_checkpoint_of_the_same_step_is_set_aside(tmp_path: Path) -> None:
    (write(tmp_path, 1) / "config.yaml").write_text("other")
    write(tmp_path, 1)
    assert held(tmp_path) == (1, 1.0)
    assert [name[:7] for name in names(tmp_path)] == [".bad-1-", "1", "latest."]


@pytest.mark.parametrize("replace", [False, True], ids=["next step", "same step, other content"])
def test_a_crash_at_any_call_of_a_save_leaves_a_valid_checkpoint(tmp_path: Path, replace: bool) -> None:
    step, value = (1, 9.0) if replace else (2, 2.0)
    counting = FaultyOs()
    with pytest.MonkeyPatch.context() as patch:
        write(tmp_path / "count", 1)
        patch.setattr(storage, "os", counting)
        write(tmp_path / "count", step, value=value)
    assert {"mkdir", "open", "write", "fsync", "rename"} < set(counting.calls)
    for call in range(len(counting.calls)):
        root = tmp_path / str(call)
        write(root, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "os", FaultyOs(fail_at=call))
            with pytest.raises(Crash):
                write(root, step, value=value)
        recover(root)
        assert held(root) in {(1, 1.0), (step, value)}
        write(root, step, value=value)
        assert held(root) == (step, value)
        assert [name for name in names(root) if name.startswith(".")] == []


def recover(root: Path) -> None:
    """Clean up as a start does, crashing once at each call of that, too."""
    for call in range(100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "os", FaultyOs(fail_at=call))
            try:
                return clean(root)
            except Crash:
                continue
    raise AssertionError("cleaning up does not come to an end")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_an_error_at_any_call_of_a_save_is_explained_and_undone(tmp_path: Path, code: int) -> None:
    counting = FaultyOs()
    write(tmp_path / "count", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "os", counting)
        write(tmp_path / "count", 2)
    for call in range(len(counting.calls)):
        root = tmp_path / str(call)
        write(root, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "os", FaultyOs(fail_at=call, code=code))
            try:
                write(root, 2)
                said = None
            except StorageError as error:
                said = str(error)
        if said is None:
            assert held(root) == (2, 2.0), "only latest.txt, which nobody reads, may fail without an error"
        else:
            assert explains(said, root, code)
        assert held(root) in {(1, 1.0), (2, 2.0)}
        assert [name for name in names(root) if name.startswith(".tmp-2")] == []
        write(root, 2)
        assert held(root) == (2, 2.0)


def explains(message: str, root: Path, code: int) -> bool:
    cause, remedy = storage.CAUSES[code]
    return message.startswith(str(root)) and all(
        part in message for part in (cause, remedy, "bytes are needed", "are free", "earlier checkpoints")
    )


def test_a_failed_save_names_the_file_that_could_not_be_written(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "os", FaultyOs(fail_at=5, code=errno.ENOSPC))  # after the temporary folder's five calls
        with pytest.raises(StorageError, match=r"/\.tmp-2-[0-9a-f]{8}/optimizer-.*: the disk is full \(\d+ bytes"):
            write(tmp_path, 2)


def traced(base: Path) -> tuple[list[tuple[object, ...]], list[int]]:
    """What saving 1, saving 2 and saving another 2 does to the disk, and after how many events each was done."""
    recording, done = RecordingOs(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "os", recording)
        for step, value in ((1, 1.0), (2, 2.0), (2, 9.0)):
            write(base / "run", step, value=value)
            done.append(len(recording.events))
    return recording.events, done


SAVED = [(1, 1.0), (2, 2.0), (2, 9.0)]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[object, ...]], list[int]]:
    base = tmp_path_factory.mktemp("trace")
    return base, *traced(base)


@settings(max_examples=300)
@given(data=st.data())
def test_a_power_loss_at_any_moment_leaves_the_last_finished_save_or_the_next(
    trace: tuple[Path, list[tuple[object, ...]], list[int]],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    base, events, done = trace
    moment = data.draw(st.integers(0, len(events)), label="events before the power failed")
    disk = after_power_loss(events[:moment], base, lambda: data.draw(st.booleans()))
    finished = sum(moment >= end for end in done)
    left = tmp_path_factory.mktemp("left") / "disk"
    disk.write_out(left)
    clean(left / "run")
    if finished == 0 and newest(left / "run") is None:
        return
    assert held(left / "run") in SAVED[max(0, finished - 1) : finished + 1]


def test_the_power_loss_model_notices_a_save_that_does_not_sync_its_files(
    trace: tuple[Path, list[tuple[object, ...]], list[int]], tmp_path: Path
) -> None:
    base, events, done = trace
    careless = [event for event in events[: done[1]] if not (event[0] == "fsync" and "." in Path(str(event[1])).name)]
    after_power_loss(careless, base, lambda: False).write_out(tmp_path / "disk")
    assert newest_or_none(tmp_path / "disk" / "run") != SAVED[1]


def newest_or_none(root: Path) -> tuple[int, float] | None:
    try:
        return held(root)
    except (RuntimeError, AssertionError):
        return None


def test_cleaning_removes_what_a_crash_left_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for name in (".tmp-2-0123abcd", ".trash-run-0123abcd", ".old-1-0123abcd"):
        (tmp_path / name / "inside").mkdir(parents=True)
    (tmp_path / ".tmp-latest-0123abcd").touch()
    for name in (".bad-3-0123abcd", ".tmp-notes", "notes", ".git"):
        (tmp_path / name).mkdir()
    clean(tmp_path)
    assert names(tmp_path) == [".bad-3-0123abcd", ".git", ".tmp-notes", "1", "latest.txt", "notes"]


def test_cleaning_puts_back_a_checkpoint_that_was_about_to_be_replaced(tmp_path: Path) -> None:
    write(tmp_path, 1).rename(tmp_path / ".old-1-0123abcd")
    clean(tmp_path)
    assert held(tmp_path) == (1, 1.0)


def test_removing_a_run_leaves_what_is_not_of_the_run(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 20)
    (tmp_path / "logs").mkdir()
    for name in ("metrics.jsonl", "metrics.3.jsonl.old", "report.html", "loss.png", "logs/rank-0.log"):
        (tmp_path / name).touch()
    (tmp_path / "2024").mkdir()
    for name in ("config.yaml", "logs/mine.log", "2024/photo.png"):
        (tmp_path / name).touch()
    remove_run(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "2024",
        "2024/photo.png",
        "config.yaml",
        "logs",
        "logs/mine.log",
    ]


def test_a_folder_that_is_no_run_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in ("report.html", "latest.txt", "logs/rank-0.log"):
        (tmp_path / name).touch()
    remove_run(tmp_path)
    remove_run(tmp_path / "missing")
    assert names(tmp_path) == ["latest.txt", "logs", "report.html"]


def test_links_in_a_folder_that_is_removed_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis").touch()
    (tmp_path / "run" / ".tmp-2-0123abcd").mkdir(parents=True)
    (tmp_path / "run" / ".tmp-2-0123abcd" / "link").symlink_to(tmp_path / "precious")
    clean(tmp_path / "run")
    assert (tmp_path / "precious" / "thesis").exists()
    assert names(tmp_path / "run") == []


def test_a_name_that_could_leave_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be the name of a file"):
        save(tmp_path, step=1, groups={}, state={}, files={"../x": b""})


def test_a_state_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?i)out of range float"):
        save(tmp_path, step=1, groups={}, state={"loss": float("nan")})
    assert names(tmp_path) == []
