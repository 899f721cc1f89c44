"""The scripts at the root, under the names that Nanotron's users and the nanoGPT2 guide's readers type."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pentode.generate.command import RULE
from tests.helpers.source import ROOT
from tests.helpers.tiny import rows, text, tiny_yaml

CHANGES = {"max_iters": 4, "eval_iters": 1, "eval_interval": 2, "batch_size": 4, "block_size": 16, "n_layer": 2}


def nano_yaml(folder: Path, **changes: object) -> Path:
    """configs/nano.yaml, smaller, on a text of its own; run and text are found from the working directory."""
    config = yaml.safe_load((ROOT / "configs" / "nano.yaml").read_text())
    config |= CHANGES | {"n_head": 2, "n_embd": 16, "device": "cpu", "data_path": "text.txt"} | changes
    (folder / "text.txt").write_text(text())
    (folder / "nano.yaml").write_text(yaml.safe_dump(config))
    return folder / "nano.yaml"


def script(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a script in this process, as `python name arguments`; its exit code."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    assert isinstance(left.value.code, int)
    return left.value.code


def test_run_train_under_torchrun(tmp_path: Path) -> None:
    file = tiny_yaml(tmp_path, tokens__train_steps=2)
    command = ["-m", "torch.distributed.run", "--nproc_per_node=1", "run_train.py", "--config-file", str(file)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize(("name", "flag"), [("train.py", "--config"), ("run_train.py", "--config-file")])
def test_overrides_and_options_may_stand_in_any_order(
    name: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = str(nano_yaml(tmp_path))
    there = tmp_path / "there"
    there.mkdir()
    (there / "metrics.jsonl").write_text("of another run\n")
    words = ["checkpoints.checkpoints_path=there", "--fresh", "tokens.train_steps=2", "--nproc", "1", flag, file]
    assert script(name, *words, monkeypatch=monkeypatch) == 0
    assert [row["step"] for row in rows(there)] == [1, 2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with configs/nano.yaml's run in it."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert script("train.py", "--config", str(nano_yaml(folder)), monkeypatch=patch) == 0
    return folder


def test_sample_writes_as_many_samples_as_asked_for_each_its_own(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run)
    capsys.readouterr()
    asked = ["--start=the ", "--num_samples=3", "--max_new_tokens=30", "--temperature=2.0", "--top_k=9", "--seed=7"]
    assert script("sample.py", *asked, monkeypatch=monkeypatch) == 0
    out, err = capsys.readouterr()
    samples = out.removesuffix("\n").split(f"\n{RULE}\n")
    assert err == ""
    assert [len(sample) for sample in samples] == [34, 34, 34]
    assert len(set(samples)) == 3
    monkeypatch.chdir("/")
    elsewhere = ["--checkpoint_dir", str(run / "checkpoints" / "nano"), *asked]
    assert script("sample.py", *elsewhere, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("name", ["run_generate.py", "run_generation.py"])
def test_nanotrons_names_write_the_likeliest_text(
    name: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run)
    written = []
    for sizes in (["--tp", "1", "--pp", "1"], ["--dp", "1", "--tp", "0", "--pp", "0"], []):
        capsys.readouterr()
        asked = [
            "--ckpt-path",
            "checkpoints/nano/4/",
            *sizes,
            "--max-new-tokens",
            "9",
            "--prompt",
            "the ",
            "--prompt=a",
        ]
        assert script(name, *asked, monkeypatch=monkeypatch) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] == written[2]
    first, second = written[0].split(f"\n{RULE}\n")
    assert first.startswith("the ")
    assert second.startswith("a")
    assert script(name, "--ckpt-path", "checkpoints/nano", "--max-new-tokens=20", monkeypatch=monkeypatch) == 0
    assert len(capsys.readouterr().out) == 21  # without a prompt, a new text


@pytest.mark.parametrize(
    ("command", "code", "what"),
    [
        ("train.py", 64, "train.py: the following arguments are required: --config"),
        ("run_train.py", 64, "run_train.py: the following arguments are required: --config-file"),
        ("train.py --config none.yaml", 64, "none.yaml: No such file or directory; give the path of a YAML file"),
        ("train.py --config nano.yaml --frsh", 64, "No such option"),
        ("train.py --config nano.yaml tokens.train_stps=1", 64, "train_stps: unknown key"),
        ("run_generate.py", 64, "run_generate.py: the following arguments are required: --ckpt-path"),
        ("run_generate.py --ckpt-path x --tp 2", 66, "x: no such folder"),
        ("run_generation.py --ckpt-path x --dp 4", 64, "--dp 4: replicas would write the same text; use --dp 1"),
        ("run_generate.py --ckpt-path x --tp two", 64, "argument --tp: invalid int value: 'two'"),
        ("run_generate.py --ckpt-path none", 66, "none: no such folder"),
        ("sample.py --num_samples 0", 64, "--num_samples 0: give 1 or more"),
        ("sample.py --config none.yaml", 64, "none.yaml: No such file or directory"),
        ("sample.py --temprature 1", 64, "unrecognized arguments: --temprature 1"),
        ("sample.py --config nano.yaml", 66, "checkpoints/nano: no such folder"),
    ],
)
def test_what_is_wrong_is_told_with_its_code(
    command: str,
    code: int,
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    nano_yaml(tmp_path)
    assert script(*command.split(), monkeypatch=monkeypatch) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert what in err
    if "--frsh" not in command:  # typer's own errors come with the usage
        assert err.count("\n") == 1
    assert not (tmp_path / "checkpoints").exists()


def test_a_gpu_that_is_not_there_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert script("train.py", "--config", str(nano_yaml(tmp_path, device="cuda")), monkeypatch=monkeypatch) == 64
    assert capsys.readouterr().err == "general.device: cuda, but torch finds no GPU here; use device cpu, or auto\n"


@pytest.mark.parametrize("name", ["train.py", "run_train.py", "sample.py", "run_generate.py", "run_generation.py"])
def test_help_is_there_wherever_one_stands(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / name), "--help"]
    environment = {variable: value for variable, value in os.environ.items() if variable != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {name}")


def test_sample_without_a_config_is_that_of_nano(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run)
    capsys.readouterr()
    assert script("sample.py", "--start=the ", "--max_new_tokens=20", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.startswith("the ")
