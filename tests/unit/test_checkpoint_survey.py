"""`pentode checkpoint`: which checkpoints stand in a folder, what is wrong with them, what one of them holds."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pentode.checkpoint.layout import Saved
from pentode.checkpoint.save import save
from pentode.checkpoint.survey import contents, lines, survey, verify
from pentode.cli import run_command
from pentode.config.dump import to_yaml
from pentode.errors import CheckpointError
from pentode.version import VERSION
from tests.helpers.source import ROOT
from tests.helpers.tiny import tiny_config

WEIGHTS = "weights-00000-of-00001.safetensors"
NAMES = ["config.yaml", "manifest.json", "optimizer-00000-of-00001.safetensors", "state.json", WEIGHTS]


def write(root: Path, step: int) -> Path:
    config = tiny_config(root.parent, parallelism__dp=2, optimizer__zero_stage=1, model__model_config__vocab_size=19)
    groups = {
        "weights": {"w": Saved.whole(torch.full((3, 4), float(step))), "v": Saved.whole(torch.ones(2).bfloat16())},
        "optimizer": {"exp_avg/w": Saved((3, 4), [((0, 0), torch.ones(1, 4)), ((1, 0), torch.ones(2, 4))])},
    }
    state = {
        "updates": step,
        "train": {"step": step, "consumed_samples": 8 * step, "consumed_tokens": 128 * step},
        "versions": {"pentode": VERSION, "torch": torch.__version__, "python": "3.11"},
    }
    return save(root, step=step, groups=groups, state=state, files={"config.yaml": to_yaml(config).encode()})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with checkpoints 4, 8 and 12."""
    root = tmp_path_factory.mktemp("saved") / "run"
    for step in (4, 8, 12):
        write(root, step)
    return root


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def flip(path: Path, draw: Callable[..., Any]) -> None:
    data = bytearray(path.read_bytes())
    data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    path.write_bytes(data)


def cut(path: Path, draw: Callable[..., Any]) -> None:
    least = 2 if path.name == "manifest.json" else 1  # its last byte, a newline, says nothing: its digest still holds
    os.truncate(path, draw(st.integers(0, path.stat().st_size - least)))


def lengthen(path: Path, draw: Callable[..., Any]) -> None:
    path.write_bytes(path.read_bytes() + b"x" + draw(st.binary(max_size=20)))


def remove(path: Path, draw: Callable[..., Any]) -> None:
    path.unlink()


def link(path: Path, draw: Callable[..., Any]) -> None:
    elsewhere = path.parent.parent.parent / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def turn_into_a_folder(path: Path, draw: Callable[..., Any]) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (flip, cut, lengthen, remove, link, turn_into_a_folder)


def test_list_names_each_checkpoint_and_what_became_of_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "8" / WEIGHTS).unlink()
    shutil.copytree(run / "8", run / ".bad-8-0123abcd")
    shutil.copytree(run / "4", run / ".old-4-0123abcd")
    (run / ".tmp-16-0123abcd").mkdir()
    (run / ".tmp-16-0123abcd" / "state.json").write_bytes(b"12345")
    for other in ("logs", "best", ".trash-run-0123abcd", ".tmp-latest-0123abcd", ".tmp-20"):
        (run / other).mkdir()
    assert run_command(["checkpoint", "list", str(run)]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split(maxsplit=6) for line in printed]
    assert rows[0] == ["step", "bytes", "when", "layout", "status", "name"]
    assert [(row[0], row[4], row[5]) for row in rows[1:]] == [
        ("4", "good", "4"),
        ("4", "replaced", ".old-4-0123abcd"),
        ("8", "damaged", "8"),
        ("8", "quarantined", ".bad-8-0123abcd"),
        ("12", "good", "12"),
        ("16", "unfinished", ".tmp-16-0123abcd"),
    ]
    assert [row[6] for row in rows if len(row) > 6] == [
        f"checkpoint 8 in {run}: {WEIGHTS} cannot be read (No such file or directory)"
    ]
    assert rows[5][3] == "dp=2,tp=1,pp=1,zero=1"
    assert [row[1] for row in rows[5:]] == [str(sum(path.stat().st_size for path in (run / "12").iterdir())), "5"]

    assert run_command(["checkpoint", "list", "--json", str(run)]) == 0
    objects = json.loads(capsys.readouterr().out)
    assert [(str(o["step"]), str(o["bytes"]), o["when"]) for o in objects] == [tuple(row[:3]) for row in rows[1:]]
    assert objects[4]["layout"] == {"dp": 2, "tp": 1, "pp": 1, "zero": 1}


def test_a_quick_list_compares_sizes_alone(run: Path) -> None:
    flip(run / "4" / WEIGHTS, lambda _: 0)
    (run / "8" / WEIGHTS).write_bytes(b"")
    assert [found.status for found in survey(run, checksums=False)] == ["complete", "damaged", "complete"]
    assert [found.status for found in survey(run)] == ["damaged", "damaged", "good"]


def test_verify_says_that_all_is_good(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, steps in ((saved, (4, 8, 12)), (saved / "8", (8,))):
        assert run_command(["checkpoint", "verify", str(path)]) == 0
        assert capsys.readouterr().out.splitlines() == [f"{saved / str(step)}: good" for step in steps]


@given(data=st.data(), names=st.sets(st.sampled_from(NAMES), min_size=1), damage=st.sampled_from(DAMAGES))
def test_verify_finds_every_damage_of_every_file(
    saved: Path,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    names: set[str],
    damage: Callable[..., None],
) -> None:
    root = Path(shutil.copytree(saved, tmp_path_factory.mktemp("damaged") / "run"))
    for name in sorted(names):
        damage(root / "8" / name, data.draw)
    found: list[str] = []
    with pytest.raises(CheckpointError, match=r"1 of 3 checkpoints damaged"):
        found.extend(verify(root))
    assert found[0] == f"{root}/4: good"
    assert found[-1] == f"{root}/12: good"
    wrong = found[1:-1]
    if "manifest.json" in names:  # without it nothing is known of the others
        assert len(wrong) == 1
        assert "manifest.json" in wrong[0]
    else:
        assert len(wrong) == len(names)
        assert all(any(name in line for line in wrong) for name in names)


def test_a_damage_is_exit_code_66_and_a_line_each(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "12" / "state.json").write_bytes(b"{}\n")
    (run / "12" / WEIGHTS).unlink()
    assert run_command(["checkpoint", "verify", str(run / "12")]) == CheckpointError.exit_code == 66
    printed = capsys.readouterr()
    first, second = printed.out.splitlines()
    assert first.startswith(f"checkpoint 12 in {run}: state.json has 3 bytes, not ")
    assert second == f"checkpoint 12 in {run}: {WEIGHTS} cannot be read (No such file or directory)"
    assert printed.err.splitlines() == [
        f"pentode: {run / '12'}: 1 of 1 checkpoints damaged; restore from a copy, or use another"
    ]


def test_show_tells_what_a_checkpoint_holds(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = contents(saved)
    assert found == contents(saved / "12")
    assert (found["step"], found["samples"], found["tokens"]) == (12, 96, 1536)
    assert found["versions"]["pentode"] == VERSION
    assert found["layout"] == {"dp": 2, "tp": 1, "pp": 1, "zero": 1}
    assert found["model"]["type"] == "gpt2"
    assert found["parameters"] == 19 * 16 + 16 * 16 + 2 * (12 * 16**2 + 13 * 16) + 2 * 16
    assert found["files"] == {name: (saved / "12" / name).stat().st_size for name in NAMES if name != "manifest.json"}
    weights, optimizer = found["groups"]["weights"], found["groups"]["optimizer"]
    assert (weights["files"], weights["tensors"], weights["dtypes"]) == (1, 2, ["BF16", "F32"])
    assert (optimizer["files"], optimizer["tensors"], optimizer["dtypes"]) == (1, 1, ["F32"])
    assert weights["bytes"] == found["files"][WEIGHTS]

    assert run_command(["checkpoint", "show", str(saved)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == list(lines(found))
    assert {"step: 12", "layout.zero: 1", "model.n_inner: -", "groups.weights.dtypes: BF16 F32"} <= set(printed)
    assert run_command(["checkpoint", "show", "--json", str(saved / "12")]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_what_a_checkpoint_lacks_is_left_open(tmp_path: Path) -> None:
    folder = save(tmp_path, step=0, groups={"weights": {}}, state={}, files={"config.yaml": b"general: 3\n"})
    found = contents(folder)
    assert (found["samples"], found["layout"], found["versions"]) == (None, None, None)
    assert found["groups"]["weights"]["tensors"] == 0
    assert "layout: -" in list(lines(found))
    assert [one.layout for one in survey(tmp_path)] == [None]


@pytest.mark.parametrize("command", ["list", "verify", "show"])
def test_a_folder_without_checkpoints_is_told_in_a_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none", "file"):
        assert run_command(["checkpoint", command, str(tmp_path / name)]) == 66
        printed = capsys.readouterr()
        assert printed.out == ""
        assert len(printed.err.splitlines()) == 1
        assert printed.err.startswith(f"pentode: {tmp_path / name}: ")
    assert run_command(["checkpoint", command]) == 64


def test_verify_of_a_step_without_manifest_says_so(tmp_path: Path) -> None:
    (tmp_path / "3").mkdir()
    with pytest.raises(CheckpointError, match=r"1 of 1"):
        assert list(verify(tmp_path / "3")) == [f"{tmp_path / '3'}: it has no manifest.json, so it is no checkpoint"]


@pytest.mark.parametrize("command", ["list", "verify", "show"])
def test_the_commands_import_no_torch(command: str, saved: Path) -> None:
    arguments = [sys.executable, "-X", "importtime", "-m", "pentode", "checkpoint", command, str(saved)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not [line for line in done.stderr.splitlines() if line.endswith(("| torch", " torch", "| numpy"))]
