"""pentode checkpoint list, verify and show, of a run in an object store: what they say of the same run on a disk."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pentode.checkpoint import objects
from pentode.checkpoint.manifest import MANIFEST
from pentode.cli import run_command
from tests.helpers.object_store import Bucket
from tests.helpers.sent import WEIGHTS, bucket_in_parts, flip_object, remote_of, upload
from tests.helpers.tiny import tiny_yaml


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints 4 and 8."""
    folder = tmp_path_factory.mktemp("source")
    with pytest.MonkeyPatch.context() as patch:  # others test these, and they take longest
        patch.setattr("pentode.report.page.write_report", lambda root: None)
        patch.setattr("pentode.generate.closing.closing_sample", lambda run, root: None)
        assert run_command(["train", str(tiny_yaml(folder)), "tokens.train_steps=8"]) == 0
    return folder / "run"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, run: Path) -> Iterator[Bucket]:
    """A bucket with its checkpoints."""
    with bucket_in_parts(monkeypatch) as made:
        for step in ("4", "8"):
            upload(remote_of(made), run / step)
        yield made


def told(capfd: pytest.CaptureFixture[str], *words: str, code: int = 0) -> list[str]:
    capfd.readouterr()
    assert run_command(["checkpoint", *words]) == code
    return capfd.readouterr().out.splitlines()


def test_a_list_says_what_it_says_of_a_folder(store: Bucket, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def facts(*words: str) -> list[dict[str, Any]]:
        found = json.loads("\n".join(told(capfd, "list", "--json", *words)))
        return [{key: value for key, value in one.items() if key != "when"} for one in found]

    assert facts(store.url) == facts(str(run))
    assert facts(store.url, "--quick") == facts(str(run), "--quick")
    line = told(capfd, "list", store.url)[2]
    assert re.match(r"8 +\d+ +20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ +dp=1,tp=1,pp=1,zero=0 +good +8$", line)


def test_a_list_tells_damaged_from_unfinished_and_quarantined(store: Bucket, capfd: pytest.CaptureFixture[str]) -> None:
    flip_object(store, f"8/{WEIGHTS}")
    store.change(f"12/{WEIGHTS}", b"part")
    store.change(f"16/bad-0123abcd-{MANIFEST}", b"{}")
    lines = told(capfd, "list", store.url)
    assert [line.split()[4] for line in lines] == ["status", "good", "damaged", "unfinished", "quarantined"]
    assert "its checksum is wrong" in lines[2]
    assert [line.split()[4] for line in told(capfd, "list", "--quick", store.url)][1:3] == ["complete", "complete"]


def test_verify_names_what_is_damaged(store: Bucket, capfd: pytest.CaptureFixture[str]) -> None:
    assert told(capfd, "verify", store.url) == [f"{store.url}/4: good", f"{store.url}/8: good"]
    flip_object(store, "8/state.json")
    lines = told(capfd, "verify", store.url, code=66)
    assert lines == [f"{store.url}/4: good", f"{store.url}/8/state.json: it is damaged, its checksum is wrong"]
    assert told(capfd, "verify", f"{store.url}/4") == [f"{store.url}/4: good"]


@pytest.mark.parametrize("step", ["", "/8", "/4"])
def test_show_says_what_it_says_of_a_folder_and_reads_no_tensors(
    store: Bucket, run: Path, step: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = objects.Objects.read

    def read(self: objects.Objects, patience: Any, name: str, size: int) -> Iterator[bytes]:
        asked.append(size)
        return real(self, patience, name, size)

    monkeypatch.setattr(objects.Objects, "read", read)
    there = told(capfd, "show", store.url + step)
    here = told(capfd, "show", f"{run}{step or '/8'}")
    assert there[0] == f"checkpoint: {store.url}{step or '/8'}"
    assert [line for line in there[1:] if not line.startswith("when")] == [
        line for line in here[1:] if not line.startswith("when")
    ]
    assert max(asked) < (run / "8" / WEIGHTS).stat().st_size / 2


def test_an_address_without_a_checkpoint_is_told(store: Bucket, capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("list", "verify", "show"):
        told(capfd, command, f"{store.url}/nothing", code=66)
        assert run_command(["checkpoint", command, f"{store.url}/nothing"]) == 66
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"pentode: {store.url}/nothing: holds no checkpoint")
    assert run_command(["checkpoint", "list", "s3://user:word@bucket/x"]) == 64


def test_no_torch_is_loaded(store: Bucket) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "pentode", "checkpoint", "show", store.url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)
