"""Whole runs whose checkpoints are in an object store: saved there, copied there, gone on from there."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from pentode.checkpoint import remote, upload
from pentode.cli import run_command
from pentode.train import copies
from tests.helpers.kill_run import Command, exit_code
from tests.helpers.object_store import SECRET, Bucket, Fault, Gate, Proxy, bucket, pentode_in_parts, smaller_parts
from tests.helpers.source import ROOT
from tests.helpers.tiny import rows, tiny_yaml, weights
from tests.unit.test_training import before_step

WEIGHTS = "weights-00000-of-00001.safetensors"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    """A bucket; what is not given a place is staged in `tmp_path`. Reports and samples are short: others test them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pentode.report.page.write_report", lambda root: (root / "report.html").write_text("a report"))
    monkeypatch.setattr("pentode.generate.closing.closing_sample", lambda run, root: None)
    with bucket(monkeypatch) as made:
        yield made


def in_s3(folder: Path, store: Bucket, **changes: object) -> Path:
    """The tiny run with its checkpoints in the store, staged in `folder`/run."""
    places = {"checkpoints__checkpoints_path": store.url, "checkpoints__staging_path": str(folder / "run")}
    return tiny_yaml(folder, **places, **changes)


def copied(folder: Path, store: Bucket, *, remove: bool, **changes: object) -> Path:
    """The tiny run with copies of its checkpoints in the store, under Nanotron's keys."""
    upload = {"upload_s3_path": store.url, "remove_after_upload": remove}
    return tiny_yaml(folder, s3_upload=upload, **changes)


def uninterrupted(folder: Path) -> bytes:
    """The weights at the end of the same run without a store."""
    folder.mkdir()
    assert run_command(["train", str(tiny_yaml(folder))]) == 0
    return weights(folder / "run", 12)


def test_a_run_in_the_store_is_saved_there_and_gone_on_with_from_there(
    tmp_path: Path, store: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    file = in_s3(tmp_path, store)
    assert run_command(["train", str(file), "tokens.train_steps=6", "tokens.val_check_interval=-1"]) == 0
    assert store.published() == [4, 6]
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.isdigit()]

    elsewhere = f"checkpoints.staging_path={tmp_path / 'other'}"  # as on another machine
    assert run_command(["train", str(file), elsewhere]) == 0
    assert store.published() == [4, 6, 8, 12]
    assert "Resuming after step 6 of 12" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path / "other")] == list(range(1, 13))

    assert run_command(["train", str(file)]) == 0
    told = capsys.readouterr().out
    assert f"{store.url}/12: complete at step 12" in told
    assert "Downloading" not in told


def test_a_resumed_run_ends_in_the_bits_of_one_without_a_store(tmp_path: Path, store: Bucket) -> None:
    expected = uninterrupted(tmp_path / "plain")
    file = in_s3(tmp_path, store)
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_command(["train", str(file)]) == 75
    assert store.published() == [4, 7]
    assert run_command(["train", str(file)]) == 0
    assert store.read(f"12/{WEIGHTS}") == expected


@pytest.mark.parametrize("remove", [False, True])
def test_copies_are_sent_and_local_ones_removed_as_asked(tmp_path: Path, store: Bucket, remove: bool) -> None:
    assert run_command(["train", str(copied(tmp_path, store, remove=remove))]) == 0
    assert store.published() == [4, 8, 12]
    assert local(tmp_path) == ([] if remove else ["12", "4", "8"])
    for name in ("metrics.jsonl", "report.html"):
        assert store.read(name) == (tmp_path / "run" / name).read_bytes()


def test_a_run_whose_local_folder_is_gone_goes_on_from_the_copies(tmp_path: Path, store: Bucket) -> None:
    expected = uninterrupted(tmp_path / "plain")
    file = copied(tmp_path, store, remove=True)
    assert run_command(["train", str(file), "tokens.train_steps=8"]) == 0
    assert run_command(["train", str(file), f"checkpoints.checkpoints_path={tmp_path / 'new'}"]) == 0
    assert store.read(f"12/{WEIGHTS}") == expected


@pytest.mark.parametrize(("path", "first"), [("", 13), ("/8", 9)])
def test_a_run_begins_with_another_runs_checkpoint_in_the_store(
    tmp_path: Path, store: Bucket, path: str, first: int
) -> None:
    assert run_command(["train", str(in_s3(tmp_path, store))]) == 0
    (tmp_path / "next").mkdir()
    source = {"checkpoints__resume_checkpoint_path": store.url + path}
    file = tiny_yaml(tmp_path / "next", **source, tokens__train_steps=14)
    assert run_command(["train", str(file)]) == 0
    run = tmp_path / "next" / "run"
    assert rows(run)[0]["step"] == first
    assert not (run / "from-s3").exists()
    assert store.published() == [4, 8, 12]


def test_what_could_not_be_sent_ends_the_run_with_74_and_the_next_start_sends_it(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = copied(tmp_path, store, remove=True)

    def no_eight(request: str, _: int) -> Fault | None:
        return Fault(answer=503, code="SlowDown") if request.startswith("PUT") and "/8/" in request else None

    monkeypatch.setattr(remote, "LIMIT", 0.0)
    with Proxy(no_eight) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert run_command(["train", str(file)]) == 74
    assert store.published() == [4, 12]
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name.isdigit()) == ["8"]
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "checkpoint 8 is not in the store yet" in errors[0]
    assert "SlowDown (503)" in errors[0]

    assert run_command(["train", str(file)]) == 0
    assert store.published() == [4, 8, 12]


def test_fresh_removes_the_run_in_the_store_but_no_copies(
    tmp_path: Path, store: Bucket, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["train", str(in_s3(tmp_path, store)), "tokens.train_steps=8"]) == 0
    store.change("notes.txt", b"somebody's")
    assert run_command(["train", str(in_s3(tmp_path, store)), "--fresh", "tokens.train_steps=4"]) == 0
    assert store.published() == [4]
    assert store.read("notes.txt") == b"somebody's"

    (tmp_path / "copied").mkdir()
    file = copied(tmp_path / "copied", store, remove=False)
    assert run_command(["train", str(file), "--fresh"]) == 64
    assert "--fresh: " in capfd.readouterr().err
    assert store.published() == [4]


def test_what_the_store_refuses_is_told_in_a_line_before_training(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = str(in_s3(tmp_path, store))

    def errors(code: int, *overrides: str) -> str:
        capfd.readouterr()
        assert run_command(["train", file, *overrides]) == code
        (line,) = capfd.readouterr().err.splitlines()
        return line

    assert "there is no such bucket" in errors(74, "checkpoints.checkpoints_path=s3://no-such-bucket/x")
    with Proxy(lambda request, _: Fault(answer=403, code="AccessDenied")) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert "access is refused, AccessDenied (403)" in errors(74)
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        assert "there are no usable credentials; set AWS_ACCESS_KEY_ID" in errors(74)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "s3fs", None)
        assert 'pip install "pentode[s3]"' in errors(64)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_credentials_are_written_nowhere(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = copied(tmp_path, store, remove=False)
    with Proxy(lambda request, number: Fault(answer=500) if number % 7 == 5 else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert run_command(["train", str(file), "tokens.train_steps=4"]) == 0
    printed = capfd.readouterr()
    told = [printed.out.encode(), printed.err.encode(), *map(store.read, store.names())]
    told += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(told) > 10
    assert not [text for text in told if SECRET.encode() in text or b"AKIA" in text]


def test_a_preempted_run_does_not_wait_long_for_its_uploads_and_the_next_start_sends_them(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file, hold = in_s3(tmp_path, store, checkpoints__grace_s=6), threading.Event()
    waits: list[float] = []
    real = copies.Copies._wait
    monkeypatch.setattr(copies.Copies, "_wait", lambda self, seconds: (waits.append(seconds), real(self, 0.1)))
    monkeypatch.setattr(upload, "FAREWELL", 0.0)

    def stuck(request: str, _: int) -> Fault | None:
        return Fault(held=hold) if request.startswith("PUT") and "/7/" in request else None

    with Proxy(stuck) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        before_step(patch, 7, lambda: terminate_when_sent(store, tmp_path / "run" / "4"))
        assert run_command(["train", str(file)]) == 75
        hold.set()
    assert store.published() == [4]
    assert waits == [2.0]
    told = capfd.readouterr().out
    assert f"checkpoint 7 is not in the store yet, and kept in {tmp_path / 'run'}; the next start sends" in told
    monkeypatch.setattr(copies.Copies, "_wait", real)
    assert run_command(["train", str(file)]) == 0
    assert store.published() == [4, 7, 8, 12]


def test_a_run_that_is_stopped_in_its_last_step_does_not_wait_long_for_its_uploads(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, waits = in_s3(tmp_path, store), list[float]()
    real = copies.Copies._wait
    with monkeypatch.context() as patch:
        patch.setattr(copies.Copies, "_wait", lambda self, seconds, **_: (waits.append(seconds), real(self, seconds)))
        before_step(patch, 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_command(["train", str(file)]) == 75
    assert waits == [20.0]
    assert run_command(["train", str(file)]) == 0
    assert store.published() == [4, 8, 12]


def terminate_when_sent(store: Bucket, folder: Path) -> None:
    """SIGTERM when a checkpoint, which is written in the background, has been sent and removed."""
    while int(folder.name) not in store.published() or folder.exists():
        threading.Event().wait(0.005)
    os.kill(os.getpid(), signal.SIGTERM)


def test_only_the_newest_stay_in_the_store_where_the_run_lives(tmp_path: Path, store: Bucket) -> None:
    store.change("1/notes.txt", b"somebody's, and no checkpoint")
    file = in_s3(
        tmp_path, store, checkpoints__keep_last=1, checkpoints__keep_every=8, checkpoints__checkpoint_interval=2
    )
    assert run_command(["train", str(file)]) == 0
    assert store.published() == [8, 12]
    assert {name.partition("/")[0] for name in store.names() if "/" in name} == {"1", "8", "12"}


def test_only_the_newest_stay_beside_their_copies_and_none_that_is_not_sent(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = copied(tmp_path, store, remove=False, checkpoints__keep_last=1)

    def no_four(request: str, _: int) -> Fault | None:
        return Fault(answer=403) if request.startswith("PUT") and "/4/" in request else None

    with Proxy(no_four) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert run_command(["train", str(file)]) == 74
    assert store.published() == [8, 12]
    assert local(tmp_path) == ["12", "4"]
    assert run_command(["train", str(file), "tokens.train_steps=13"]) == 0
    assert store.published() == [4, 8, 12, 13]
    assert local(tmp_path) == ["13"]


def test_a_prune_that_is_broken_off_is_finished_later_and_leaves_nothing_that_looks_whole(
    tmp_path: Path, store: Bucket
) -> None:
    file = in_s3(tmp_path, store, checkpoints__keep_last=1)
    deletes = [0]

    def second_fails(request: str, _: int) -> Fault | None:
        deletes[0] += "?delete" in request
        return Fault(answer=403, code="AccessDenied") if "?delete" in request and deletes[0] == 2 else None

    with Proxy(second_fails) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert run_command(["train", str(file), "tokens.train_steps=8"]) == 0
    assert store.published() == [8]
    assert f"4/{WEIGHTS}" in store.names()
    assert run_command(["train", str(file)]) == 0
    assert {name.partition("/")[0] for name in store.names() if "/" in name} == {"12"}


def test_a_step_that_is_sent_late_goes_if_newer_ones_are_there(tmp_path: Path, store: Bucket) -> None:
    file = in_s3(tmp_path, store, checkpoints__keep_last=1)

    def no_four(request: str, _: int) -> Fault | None:
        return Fault(answer=403) if request.startswith("PUT") and "/4/" in request else None

    with Proxy(no_four) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert run_command(["train", str(file)]) == 74
    assert local(tmp_path) == ["4"]
    assert run_command(["train", str(file)]) == 0
    assert store.published() == [12]
    assert local(tmp_path) == []


def test_another_checkpoint_of_a_step_takes_the_hugging_face_folder_of_the_first_away(
    tmp_path: Path, store: Bucket
) -> None:
    file = in_s3(tmp_path, store, checkpoints__save_hf=True)
    assert run_command(["train", str(file), "tokens.train_steps=8"]) == 0
    model = "hf/8/model.safetensors"
    first = store.read(model)
    store.change(f"8/{WEIGHTS}", b"damaged")
    faster = "optimizer.learning_rate_scheduler.learning_rate=0.02"
    assert run_command(["train", str(file), "tokens.train_steps=9", faster]) == 0
    assert store.published() == [4, 8, 9]
    assert store.read(model) != first


def test_a_staging_disk_need_not_hold_all_that_stays_in_the_store(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = in_s3(tmp_path, store, checkpoints__keep_last=10)
    assert run_command(["train", str(file), "tokens.train_steps=4"]) == 0
    size = sum(len(store.read(name)) for name in store.names() if name.startswith("4/"))
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=round(2.5 * size)))
    assert run_command(["train", str(file)]) == 0
    assert store.published() == [4, 8, 12]


def local(folder: Path) -> list[str]:
    """The run's checkpoints that are in its folder."""
    return sorted(path.name for path in (folder / "run").iterdir() if path.name.isdigit())


def test_hugging_face_folders_are_sent_before_their_checkpoints_are_removed(tmp_path: Path, store: Bucket) -> None:
    file = in_s3(tmp_path, store, checkpoints__save_hf=True, checkpoints__keep_last=1)
    assert run_command(["train", str(file), "tokens.train_steps=8"]) == 0
    assert store.published() == [8]
    sent = {name for name in store.names() if name.startswith("hf/")}
    assert {"hf/8/config.json", "hf/8/model.safetensors"} <= sent
    assert not [name for name in sent if not name.startswith("hf/8/")]
    assert local(tmp_path) == []
    assert not list((tmp_path / "run" / "hf").iterdir())


def test_a_kill_in_mid_upload_loses_nothing_and_shows_nothing_half_sent(
    tmp_path: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller_parts(monkeypatch)
    expected, file = uninterrupted(tmp_path / "plain"), in_s3(tmp_path, store)
    for step, seen in ((4, []), (8, [4])):
        gate = Gate(f"PUT .*/{step}/optimizer.*partNumber=2")
        with Proxy(gate) as proxy:
            killed = start_in_parts(file, proxy.url, tmp_path)
            assert gate.reached.wait(60)
            killed.kill()
            assert exit_code(killed) == -signal.SIGKILL
        gate.opened.set()
        assert store.published() == seen
        assert store.unfinished() == 1
    assert run_command(["train", str(file)]) == 0
    assert store.published()[-1] == 12
    assert store.unfinished() == 0
    assert store.read(f"12/{WEIGHTS}") == expected


def start_in_parts(file: Path, url: str, folder: Path) -> BaseProcess:
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    environment["AWS_ENDPOINT_URL"] = url
    return Command(pentode_in_parts, lambda root: [environment, "train", str(file)]).start(folder / "killed")


@pytest.mark.parametrize("where", ["s3_upload.upload_s3_path", "checkpoints.checkpoints_path"])
def test_the_example_runs(where: str, store: Bucket) -> None:
    words = [f"{where}={store.url}", "tokens.train_steps=2", "checkpoints.checkpoint_interval=1", "general.device=cpu"]
    words += ["s3_upload=null"] if where.startswith("checkpoints") else []
    assert run_command(["train", str(ROOT / "examples/s3/tiny_llama.yaml"), *words]) == 0
    assert store.published() == [1, 2]
