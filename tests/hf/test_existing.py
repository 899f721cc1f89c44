"""`model.init_method.path` on the command line: runs that begin with weights of other folders, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pentode.cli import run_command
from pentode.convert.command import convert
from tests.helpers.tiny import tiny_yaml, weights

BF16 = {"model__dtype": "bfloat16", "checkpoints__save_initial_state": True, "tokens__val_check_interval": -1}


@pytest.fixture(scope="module", autouse=True)
def no_syncs() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a bfloat16 model with checkpoint 4."""
    folder = tmp_path_factory.mktemp("trained")
    assert run_command(["train", str(tiny_yaml(folder, **BF16, tokens__train_steps=4))]) == 0
    return folder / "run"


def begin(folder: Path, path: Path, *options: str, **changes: Any) -> int:
    """Train four steps in `folder` from the weights in `path`; the exit code."""
    changes = BF16 | {"tokens__train_steps": 4} | changes
    return run_command(["train", str(tiny_yaml(folder, model__init_method={"path": str(path)}, **changes)), *options])


def masters(run: Path, step: int) -> dict[str, torch.Tensor]:
    found = load_file(next((run / str(step)).glob("optimizer-*")))
    return {name: tensor for name, tensor in found.items() if name.startswith("master/")}


def test_a_checkpoint_gives_weights_and_unrounded_masters_and_no_more(trained: Path, tmp_path: Path) -> None:
    assert begin(tmp_path, trained / "4") == 0
    assert weights(tmp_path / "run", 0) == weights(trained, 4)
    want, got = masters(trained, 4), masters(tmp_path / "run", 0)
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in want.values())
    assert json.loads((tmp_path / "run" / "0" / "state.json").read_text())["updates"] == 0


def test_a_run_goes_on_when_the_folder_is_gone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    list(convert(trained, tmp_path / "hf"))
    assert begin(tmp_path, tmp_path / "hf") == 0
    assert weights(tmp_path / "run", 0) == weights(trained, 4)
    shutil.rmtree(tmp_path / "hf")
    assert begin(tmp_path, tmp_path / "hf", tokens__train_steps=6) == 0
    assert (tmp_path / "run" / "6").is_dir()
    capsys.readouterr()
    assert begin(tmp_path, tmp_path / "hf", "--fresh") == 66
    assert "hf: neither a checkpoint, nor" in one_line(capsys)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    return error


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"n_embd": 32}, "model.model_config.n_embd: 32, but {path}/config.json says 16; make them the same"),
        ({"n_head": 4}, "model.model_config.n_head: 4, but {path}/config.json says 2; make them the same"),
        ({"n_inner": 65}, "model.model_config.n_inner: 65, but {path}/config.json says 64; make them the same"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: False, but {path}/config.json says True"),
        ({"activation_function": "relu"}, "activation_function: relu, but {path}/config.json says gelu_new"),
    ],
)
def test_another_shape_is_refused_in_a_line(
    change: dict[str, Any], what: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    list(convert(trained, tmp_path / "hf"))
    capsys.readouterr()
    changes = {f"model__model_config__{key}": value for key, value in change.items()}
    assert begin(tmp_path, tmp_path / "hf", **changes) == 64
    assert what.format(path=tmp_path / "hf") in one_line(capsys)
    assert not any((tmp_path / "run").glob("[0-9]*"))


def test_what_weights_do_not_hang_on_may_change(trained: Path, tmp_path: Path) -> None:
    list(convert(trained, tmp_path / "hf"))
    change = {"embd_pdrop": 0.0, "eos_token_id": 3, "n_inner": 64, "activation_function": "gelu_pytorch_tanh"}
    changes = {f"model__model_config__{key}": value for key, value in change.items()}
    assert begin(tmp_path, tmp_path / "hf", **changes) == 0
    assert weights(tmp_path / "run", 0) == weights(trained, 4)


def test_damage_and_dtypes_are_told(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = Path(shutil.copytree(trained / "4", tmp_path / "4"))
    path = next(damaged.glob("weights-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert begin(tmp_path, damaged) == 66
    assert f"{path.name} is damaged" in one_line(capsys)
    list(convert(trained, tmp_path / "hf", dtype="float64"))
    assert begin(tmp_path, tmp_path / "hf") == 66
    assert "is float64 there, float32 here, which cannot hold it" in one_line(capsys)
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert begin(tmp_path, tmp_path / "hf") == 66
    assert "model.safetensors: cannot be read" in one_line(capsys)


def test_stretched_positions_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 61}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 16}
    dummy = [{"name": "a", "start_training_step": 1, "data": {"dataset": None}}]
    changes: dict[str, Any] = {"data_stages": dummy, "tokens__train_steps": 1, "tokens__val_check_interval": -1}
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    assert run_command(["train", str(tiny_yaml(first, model__model_config=shape, **changes))]) == 0
    list(convert(first / "run", tmp_path / "hf"))
    capsys.readouterr()
    longer = shape | {"rope_theta": 500000.0, "max_position_embeddings": 64}
    assert begin(second, tmp_path / "hf", model__model_config=longer, **changes) == 0
    lines = capsys.readouterr().out
    assert f"rope_theta: 500000.0, where {tmp_path}/hf/config.json says 10000.0" in lines
    assert f"max_position_embeddings: 64, where {tmp_path}/hf/config.json says 16" in lines
