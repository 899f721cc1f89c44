"""`pentode convert` against transformers: what it writes loads there, what transformers wrote trains and talks here."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers

from pentode.checkpoint.folder import open_checkpoint
from pentode.checkpoint.names import their_tensors
from pentode.cli import run_command
from pentode.config.kinds.gpt2 import GPT2Config
from pentode.config.kinds.llama import LlamaConfig, RopeScaling
from pentode.config.load import load_config
from pentode.convert.command import convert
from pentode.errors import CheckpointError, ConfigError
from pentode.models.registry import model_for
from pentode.run.existing import specs_of_shape
from tests.helpers.hf import from_hf
from tests.helpers.hf_models import assert_equal, ours, reference
from tests.helpers.tiny import tiny_yaml, weights

VOCABULARY = 61
POSITIONS = 64
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
}
LLAMA3 = RopeScaling(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "vocab_size": VOCABULARY}
SHAPES = {
    "llama, untied": LlamaConfig(**LLAMA, rms_norm_eps=1e-5),
    "llama 3.2": LlamaConfig(**LLAMA, rope_theta=5e5, rope_scaling=LLAMA3, tie_word_embeddings=True),
    "gpt2": GPT2Config(**GPT2),
    "gpt2, untied": GPT2Config(**GPT2, n_inner=40, tie_word_embeddings=False),
}


@pytest.fixture(autouse=True, scope="module")
def no_syncs() -> Iterator[None]:
    """Disks are slow, and no power is cut here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


def loaded(folder: Path) -> transformers.PreTrainedModel:
    model, notes = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_transformers_saved_comes_here_and_goes_back_bit_for_bit(
    shape: LlamaConfig | GPT2Config, sharded: bool, tmp_path: Path
) -> None:
    theirs = reference(shape)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB" if sharded else "1GB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == sharded
    list(convert(tmp_path / "hf", tmp_path / "ours"))
    assert_equal(ours(tmp_path / "ours"), theirs)
    assert load_config(tmp_path / "ours" / "config.yaml").model.model_config == shape

    list(convert(tmp_path / "ours", tmp_path / "back", to="hf"))
    back = loaded(tmp_path / "back")
    assert back.dtype == torch.float32
    want = theirs.state_dict()
    assert back.state_dict().keys() == want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in back.state_dict().items())
    assert_equal(ours(tmp_path / "ours"), back)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "ours"]


def test_a_large_model_is_written_in_files_that_an_index_names(tmp_path: Path) -> None:
    shape = SHAPES["llama, untied"]
    theirs = reference(shape)
    theirs.save_pretrained(tmp_path / "hf")
    list(convert(tmp_path / "hf", tmp_path / "ours"))
    list(convert(tmp_path / "ours", tmp_path / "back", max_shard_size="10KB"))
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == [path.name for path in files]
    assert index["metadata"]["total_size"] == 4 * shape.parameter_count()
    for path in files:
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 10_000
        assert {index["weight_map"][name] for name in tensors} == {path.name}
    back = loaded(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in theirs.state_dict().items())
    list(convert(tmp_path / "back", tmp_path / "again"))
    assert weights(tmp_path, "again") == weights(tmp_path, "ours")


MEASURED = """
import re, sys
from pathlib import Path
from pentode.convert.command import convert

def kib(what):
    return int(re.search(what + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

source, *targets = map(Path, sys.argv[1:])
for target in targets:
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = kib("VmRSS")
    list(convert(source, target))
    print(kib("VmHWM") - before)
    source = target
"""


def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    sizes = {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
    shape = LlamaConfig(**sizes, vocab_size=512)
    folder = tmp_path / "hf"
    folder.mkdir()
    tensors = {t.name: torch.ones(t.shape) for t in their_tensors(model_for(shape).HF_NAMES, specs_of_shape(shape))}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(shape.to_hf()))
    model, largest = 4 * shape.parameter_count(), 4 * 2 * 768 * 1536
    command = [sys.executable, "-c", MEASURED, *map(str, (folder, tmp_path / "ours", tmp_path / "back"))]
    grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(grown) == 2
    for kib in map(int, grown):
        assert 1024 * kib < 8 * largest < model / 3  # a few of the largest, and what is imported by then


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a padded vocabulary, and its checkpoints 4 and 8."""
    folder = tmp_path_factory.mktemp("trained")
    assert run_command(["train", str(config_of(folder))]) == 0
    return folder / "run"


def config_of(folder: Path, **changes: Any) -> Path:
    return tiny_yaml(folder, tokens__train_steps=8, model__make_vocab_size_divisible_by=32, **changes)


def test_a_trained_model_loads_in_transformers(trained: Path, tmp_path: Path) -> None:
    assert run_command(["convert", str(trained), str(tmp_path / "hf"), "--to", "hf"]) == 0
    model = ours(trained / "8")
    assert_equal(model, loaded(tmp_path / "hf"))
    assert (tmp_path / "hf" / "model.safetensors").stat().st_mode == (tmp_path / "hf" / "config.json").stat().st_mode


def test_a_run_begins_with_converted_weights(trained: Path, tmp_path: Path) -> None:
    list(convert(trained / "4", tmp_path / "hf"))
    list(convert(tmp_path / "hf", tmp_path / "start"))
    resumed = {"resume_checkpoint_path": str(tmp_path / "start"), "save_initial_state": True}
    changes = {f"checkpoints__{key}": value for key, value in resumed.items()}
    assert run_command(["train", str(config_of(tmp_path, **changes))]) == 66  # it has no optimizer's state
    path = config_of(tmp_path, **changes, checkpoints__load_optimizer=False)
    assert run_command(["train", str(path), "--fresh"]) == 0
    assert (tmp_path / "run" / "8").is_dir()
    begun = dict(ours(tmp_path / "start").named_parameters())
    assert all(torch.equal(param, begun[name]) for name, param in ours(trained / "4").named_parameters())
    assert weights(tmp_path / "run", 0) == weights(trained, 4)


def tokenizer_into(folder: Path) -> None:
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = FastTokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_tokenizer_comes_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference(SHAPES["gpt2"]).save_pretrained(tmp_path / "hf")
    tokenizer_into(tmp_path / "hf")
    assert run_command(["convert", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    assert "note:" not in capsys.readouterr().out
    assert run_command(["generate", str(tmp_path / "ours"), "--prompt", "w1 w2", "--max-new-tokens", "3"]) == 0
    assert run_command(["convert", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    before, after = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("hf", "back"))
    assert before == after


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_dtype_is_kept_where_there_is_one_and_rounded_where_asked(kind: torch.dtype, tmp_path: Path) -> None:
    theirs = reference(SHAPES["llama, untied"]).to(kind)
    theirs.save_pretrained(tmp_path / "hf")
    list(convert(tmp_path / "hf", tmp_path / "ours"))
    config = load_config(tmp_path / "ours" / "config.yaml")
    assert config.model.dtype == ("bfloat16" if kind == torch.bfloat16 else "float32")
    embedding = ours(tmp_path / "ours").get_parameter("embed.weight")
    assert torch.equal(embedding.float(), theirs.get_input_embeddings().weight.float())
    list(convert(tmp_path / "ours", tmp_path / "rounded", dtype="bfloat16"))
    assert loaded(tmp_path / "rounded").dtype == torch.bfloat16


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded Hugging Face folder."""
    folder = tmp_path_factory.mktemp("saved") / "hf"
    reference(SHAPES["llama, untied"]).save_pretrained(folder, max_shard_size="20KB")
    return folder


def refused(source: Path, target: Path, code: int, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What a conversion that cannot be is told; nothing is left of it."""
    beside = sorted(target.parent.iterdir())
    capsys.readouterr()
    assert run_command(["convert", str(source), str(target), *options]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    assert sorted(target.parent.iterdir()) == beside
    return printed.err


def test_what_cannot_be_is_told_in_a_line(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    assert "nothing is to be done" in refused(saved, target, 64, capsys, "--to", "hf")
    assert "--to gguf: is unknown" in refused(saved, target, 64, capsys, "--to", "gguf")
    assert "--dtype int8: is unknown" in refused(saved, target, 64, capsys, "--dtype", "int8")
    assert "--max-shard-size 5: is no size" in refused(saved, target, 64, capsys, "--max-shard-size", "5")
    assert "would be that step's" in refused(saved, tmp_path / "7", 64, capsys)
    assert "neither a checkpoint" in refused(tmp_path / "none", target, 66, capsys)
    target.mkdir()
    assert "is there already" in refused(saved, target, 64, capsys)


@pytest.mark.parametrize(
    ("change", "code", "what"),
    [
        ({"model_type": "mistral"}, 64, "model_type: 'mistral' is not built yet; llama or gpt2 is"),
        ({"attention_bias": True}, 64, "attention_bias: True is not built yet"),
        ({"num_attention_heads": 0}, 64, "config.json"),
        ({"num_key_value_heads": 3}, 64, "num_key_value_heads"),
        ({"vocab_size": -1}, 64, "config.json"),
        ({"vocab_size": 62}, 66, r"embed.weight is [61, 32], by config.json [62, 32]"),
        ({"num_hidden_layers": 3}, 66, "layers.2.attn.out.weight is not there"),
        ({"num_hidden_layers": 1}, 66, "layers.1.attn.out.weight is there"),
        ({"tie_word_embeddings": True}, 66, "tie_word_embeddings should be false"),
        ({"eos_token_id": [7, 8]}, 0, ""),
    ],
)
def test_a_config_that_does_not_fit_is_told(
    change: dict[str, Any],
    code: int,
    what: str,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = Path(shutil.copytree(saved, tmp_path / "hf"))
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if code:
        assert what in refused(source, tmp_path / "target", code, capsys)
    else:
        list(convert(source, tmp_path / "target"))
        assert load_config(tmp_path / "target" / "config.yaml").model.model_config.eos_token_id == 7


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_folder_is_one_error_or_the_same_model(
    data: st.DataObject, saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    source = Path(shutil.copytree(saved, folder / "hf"))
    path = data.draw(st.sampled_from(sorted(p for p in source.iterdir() if p.name != "generation_config.json")))
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    how = data.draw(st.sampled_from(["cut", "flip", "remove"]))
    if how == "remove":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    else:  # weights themselves have no checksum there
        at = data.draw(st.integers(0, header - 1))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << data.draw(st.integers(0, 7))]) + content[at + 1 :])
    try:
        list(convert(source, folder / "target"))
    except (CheckpointError, ConfigError):
        assert [p.name for p in folder.iterdir()] == ["hf"]
    else:
        assert how != "remove"
        assert open_checkpoint(folder / "target").step == 0


def test_tensors_that_fit_no_layer_are_told() -> None:
    shape = SHAPES["llama, untied"]
    theirs = reference(shape).state_dict()
    theirs["model.layers.0.self_attn.k_proj.weight"] = torch.ones(16, 31)
    with pytest.raises(CheckpointError, match=r"k_proj\.weight, .* are \[32, 32\], \[16, 31\], .* fit no layer"):
        from_hf(model_for(shape).HF_NAMES, theirs, tied=False)
    del theirs["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight|fit no layer"):
        from_hf(model_for(shape).HF_NAMES, theirs, tied=True)


def test_a_damaged_checkpoint_becomes_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(trained / "8", tmp_path / "8"))
    path = next(source.glob("weights-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert f"{path.name} is damaged" in refused(source, tmp_path / "hf", 66, capsys)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps(SHAPES["gpt2"].to_hf()))
    (pickled / "pytorch_model.bin").write_bytes(b"")
    assert "pickled, which is never read" in refused(pickled, tmp_path / "hf", 66, capsys)
