"""Nanotron's checkpoints, as the tests write them in its format: the same weights and logits here, or one line."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pentode.checkpoint.folder import open_checkpoint
from pentode.cli import run_command
from pentode.config.kinds.llama import LlamaConfig, RopeScaling
from pentode.config.load import load_config
from pentode.convert.command import convert
from pentode.errors import CheckpointError, ConfigError
from pentode.models.registry import model_for
from tests.helpers.hf import from_hf
from tests.helpers.hf_models import assert_equal, ours, reference
from tests.helpers.nanotron import Layout, write_nanotron
from tests.helpers.tiny import tiny_yaml

LLAMA = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=64,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)
TIED = LlamaConfig(**{**vars(LLAMA), "tie_word_embeddings": True, "num_key_value_heads": None})
SHAPES = {"untied": LLAMA, "tied": TIED}
LAYOUTS = {
    "one process": Layout(),
    "tp2": Layout(tp=2),
    "tp4 pp2": Layout(tp=4, pp=2),
    "numpy's numbers, pp3": Layout(tp=2, pp=3, numpy_numbers=True),
    "names twice": Layout(tp=2, twice_named=True),
    "qwen2": Layout(tp=2, qwen2=True),
}


@pytest.fixture(autouse=True, scope="module")
def no_syncs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weights_and_logits_are_the_same_here(shape: LlamaConfig, layout: Layout, tmp_path: Path) -> None:
    theirs = reference(shape)
    write_nanotron(tmp_path / "nanotron", shape, theirs.state_dict(), layout)
    lines = list(convert(tmp_path / "nanotron", tmp_path / "ours"))
    assert lines[1:] == ["note: there is no tokenizer, so none is written, and the model cannot write text by itself"]
    model = ours(tmp_path / "ours")
    want = from_hf(model_for(shape).HF_NAMES, theirs.state_dict(), tied=shape.tied)
    got = dict(model.named_parameters())
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert_equal(model, theirs)
    assert load_config(tmp_path / "ours" / "config.yaml").model.model_config.to_hf() == shape.to_hf()


def test_a_run_folder_gives_the_checkpoint_that_latest_names(tmp_path: Path) -> None:
    theirs = reference(LLAMA)
    for step, layout in ((10, Layout(tp=2)), (20, Layout())):
        write_nanotron(tmp_path / "run" / str(step), LLAMA, theirs.state_dict(), layout)
        theirs.lm_head.weight.data.mul_(2)
    list(convert(tmp_path / "run", tmp_path / "newest"))
    (tmp_path / "run" / "latest.txt").write_text("10")
    list(convert(tmp_path / "run", tmp_path / "named"))
    newest, named = (dict(ours(tmp_path / name).named_parameters()) for name in ("newest", "named"))
    assert torch.equal(newest["head.weight"], 2 * named["head.weight"])
    assert torch.equal(newest["embed.weight"], named["embed.weight"])


def test_training_begins_with_one_and_hugging_face_gets_one(tmp_path: Path) -> None:
    theirs = reference(LLAMA).bfloat16()
    write_nanotron(tmp_path / "nanotron", LLAMA, theirs.state_dict(), Layout(tp=2, pp=2))
    assert run_command(["convert", "--from", "nanotron", str(tmp_path / "nanotron"), str(tmp_path / "ours")]) == 0
    assert run_command(["convert", str(tmp_path / "nanotron"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert all(
        torch.equal(tensor, theirs.state_dict()[name])
        for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items()
    )
    changes = {
        "model__model_config": {**vars(LLAMA), "eos_token_id": None},
        "model__dtype": "bfloat16",
        "model__init_method": {"path": str(tmp_path / "nanotron")},
        "data_stages": [{"name": "a", "start_training_step": 1, "data": {"dataset": None}}],
        "tokens__train_steps": 1,
        "tokens__val_check_interval": -1,
        "checkpoints__save_initial_state": True,
    }
    assert run_command(["train", str(tiny_yaml(tmp_path, **changes))]) == 0
    want = dict(ours(tmp_path / "ours").named_parameters())
    assert all(torch.equal(w, want[name]) for name, w in ours(tmp_path / "run" / "0").named_parameters())


def test_scaling_that_nanotron_ignored_is_told(tmp_path: Path) -> None:
    scaling = RopeScaling(rope_type="linear", factor=4.0)
    shape = LlamaConfig(**{**vars(LLAMA), "rope_scaling": scaling})
    write_nanotron(tmp_path / "nanotron", shape, reference(shape).state_dict(), Layout())
    assert any(
        "rope_scaling is taken as it is written" in line for line in convert(tmp_path / "nanotron", tmp_path / "o")
    )


def header(change: dict[str, str]) -> Callable[[Path], None]:
    """Rewrite what a shard says of itself."""

    def act(folder: Path) -> None:
        path = next(folder.glob("model/model/decoder/0/pp_block/attn/qkv_proj/*tp-rank-1*"))
        with safe_open(path, framework="pt") as file:
            save_file({"data": file.get_tensor("data")}, path, metadata=file.metadata() | change)

    return act


def without(pattern: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.glob(pattern)).unlink()


def described(**change: object) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / "model_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return act


def of_gpt2(folder: Path) -> None:
    shape = {"is_gpt2_config": True, "n_embd": 32, "n_layer": 3, "n_head": 4}
    (folder / "model_config.json").write_text(json.dumps(shape))


def renamed(folder: Path) -> None:
    path = next(folder.glob("model/model/decoder/0/pp_block/attn/qkv_proj/*tp-rank-1*"))
    path.rename(path.with_name("weight.safetensors"))


def doubled(folder: Path) -> None:
    first = next(folder.glob("model/model/decoder/0/pp_block/attn/qkv_proj/*tp-rank-0*"))
    first.with_name(first.name.replace("pp-rank-0", "pp-rank-1")).write_bytes(first.read_bytes())


def of_datastates(folder: Path) -> None:
    for path in folder.glob("model/**/*.safetensors"):
        path.rename(path.with_suffix(".datastates"))


SLICES = "local_global_slices_pairs"
TWICE = "0,16,None|None,None,None#16,32,None|None,None,None;0,16,None|None,None,None#48,64,None|None,None,None"


@pytest.mark.parametrize(
    ("act", "code", "what"),
    [
        (without("model/model/decoder/0/**/*tp-rank-1*"), 66, "is not whole, or parts of it are there twice"),
        (without("model/model/decoder/1/pp_block/input_layernorm/*"), 66, "layers.1.attn_norm.weight is not there"),
        (doubled, 66, "layers.0.attn.qkv.weight is not whole, or parts of it are there twice"),
        (header({"unsharded_shape": "(64, 31)"}), 66, "its slices do not describe a shard"),
        (header({"unsharded_shape": "64, 32"}), 66, "its slices do not describe a shard"),
        (header({"unsharded_shape": "(96, 32)"}), 66, "are of [64, 32] and [96, 32]"),
        (header({SLICES: "0,64,None|None,None,None#0,64,None|None,None,None"}), 66, "its slices do not describe"),
        (header({SLICES: "0,16,2|None,None,None#0,16,None|None,None,None"}), 66, "its slices do not describe"),
        (header({SLICES: TWICE}), 66, "its slices do not describe"),
        (header({SLICES: ""}), 66, "its slices do not describe a shard of [32, 32]"),
        (described(hidden_size=64), 66, "is [64, 32], by model_config.json [64, 64]"),
        (described(num_hidden_layers=2), 66, "layers.2.attn.out.weight is there"),
        (described(moe_config={"num_experts": 4}), 64, "mixtures of experts are not built yet"),
        (described(num_key_value_heads=3), 64, "num_key_value_heads: 3 does not divide"),
        (of_gpt2, 64, "a gpt2, which is not read from Nanotron"),
        (described(is_llama_config=False, is_starcoder2_config=True), 64, "Starcoder2"),
        (renamed, 66, "weight.safetensors: is not named as Nanotron names"),
        (of_datastates, 66, "the datastates engine wrote them"),
    ],
)
def test_what_does_not_fit_is_one_line(
    act: Callable[[Path], None], code: int, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "nanotron"
    write_nanotron(source, LLAMA, reference(LLAMA).state_dict(), Layout(tp=2))
    act(source)
    capsys.readouterr()
    assert run_command(["convert", "--from", "nanotron", str(source), str(tmp_path / "target")]) == code
    printed = capsys.readouterr().err
    assert what in printed
    assert len(printed.splitlines()) == 1
    assert not (tmp_path / "target").exists()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two tensor-parallel processes."""
    folder = tmp_path_factory.mktemp("written") / "nanotron"
    write_nanotron(folder, LLAMA, reference(LLAMA).state_dict(), Layout(tp=2, numpy_numbers=True))
    return folder


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_checkpoint_is_one_error_or_a_model(
    data: st.DataObject, written: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    source = Path(shutil.copytree(written, folder / "nanotron"))
    path = data.draw(st.sampled_from([source / "model_config.json", *sorted(source.rglob("*.safetensors"))]))
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    if data.draw(st.booleans()):
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    else:  # weights themselves have no checksum there
        at = data.draw(st.integers(0, header - 1))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << data.draw(st.integers(0, 7))]) + content[at + 1 :])
    try:
        list(convert(source, folder / "target", kind="nanotron"))
    except (CheckpointError, ConfigError):
        assert [p.name for p in folder.iterdir()] == ["nanotron"]
    else:
        assert open_checkpoint(folder / "target").step == 0


def test_another_kind_than_said_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_nanotron(tmp_path / "nanotron", LLAMA, reference(LLAMA).state_dict(), Layout())
    for kind, code, what in (("hf", 66, "config.json: cannot be read"), ("gguf", 64, "--from gguf: is unknown")):
        assert run_command(["convert", "--from", kind, str(tmp_path / "nanotron"), str(tmp_path / "t")]) == code
        assert what in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run_command(["convert", "--from", "nanotron", str(tmp_path / "empty"), str(tmp_path / "t")]) == 66
    assert "has no model_config.json beside a folder model" in capsys.readouterr().err
