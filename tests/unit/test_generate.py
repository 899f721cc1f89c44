"""Generation: what comes next, when it ends, what an odd prompt or folder is told, with a model of our own."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor

from pentode.cli import run_command
from pentode.config.dump import save_yaml
from pentode.config.kinds.gpt2 import GPT2Config
from pentode.config.kinds.llama import LlamaConfig
from pentode.config.load import config_from_dict
from pentode.data.tokenizer import ByteTokenizer, CharTokenizer, HFTokenizer, Tokenizer
from pentode.dist.mesh import Mesh
from pentode.errors import ConfigError, DataError
from pentode.generate import text as texts
from pentode.generate.command import RULE, generate_from
from pentode.generate.engine import generate
from pentode.generate.sampling import Sampling, filtered, next_tokens
from pentode.models.registry import model_for
from pentode.nn.causal_lm import CausalLM, Part
from pentode.parallel.batch import batch_of
from tests.helpers.tiny import tiny_config, tiny_dict, tiny_yaml

VOCABULARY = 23
LLAMA = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=32,
)
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=VOCABULARY)
SHAPES = {"llama": LLAMA, "gpt2": GPT2}
GREEDY = Sampling(max_new_tokens=20, temperature=0)


def model_of(shape: LlamaConfig | GPT2Config, *, padded: int = VOCABULARY) -> CausalLM:
    model = model_for(shape).build(
        shape,
        Mesh.single(),
        Part.whole(shape.num_layers),
        device=torch.device("cpu"),
        dtype=torch.float64,
        vocab_size_padded=padded,
    )
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.4)
    return model


def prompt(rows: int = 3, length: int = 5) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def likeliest(model: CausalLM, tokens: Tensor) -> Tensor:
    """The next token of each row by the whole forward, without a cache.  # [B]"""
    rows = torch.cat((tokens, tokens[:, -1:]), dim=1)  # the last is a label only
    logits = model.logits(None, batch_of(rows, samples=torch.arange(len(tokens))))
    return logits.unflatten(0, tokens.shape)[:, -1].argmax(-1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_greedy_with_a_cache_is_the_argmax_of_the_whole_forward(shape: LlamaConfig | GPT2Config) -> None:
    model = model_of(shape).eval()
    tokens = want = prompt()
    for _ in range(GREEDY.max_new_tokens):
        want = torch.cat((want, likeliest(model, want)[:, None]), dim=1)
    assert torch.equal(generate(model, tokens, sampling=GREEDY, max_positions=32), want)


@pytest.mark.parametrize("positions", [1, 2, 7, 8])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_text_that_outgrows_the_positions_goes_on_from_its_last_half(
    shape: LlamaConfig | GPT2Config, positions: int
) -> None:
    model = model_of(shape).eval()
    tokens = want = prompt(length=4)
    read = min(4, positions)
    for _ in range(GREEDY.max_new_tokens):
        if read > positions:
            read = max(positions // 2, 1)
        want = torch.cat((want, likeliest(model, want[:, -read:])[:, None]), dim=1)
        read += 1
    assert torch.equal(generate(model, tokens, sampling=GREEDY, max_positions=positions), want)


def test_of_a_prompt_beyond_the_positions_the_end_is_read() -> None:
    model, tokens = model_of(GPT2), prompt(length=50)
    written = generate(model, tokens, sampling=GREEDY, max_positions=32)
    assert torch.equal(written[:, :50], tokens)
    assert torch.equal(written[:, 18:], generate(model, tokens[:, 18:], sampling=GREEDY, max_positions=32))


def test_the_same_seed_writes_the_same_and_another_one_something_else() -> None:
    model, tokens = model_of(LLAMA), prompt()
    drawn = [
        generate(model, tokens, sampling=Sampling(20, 1.0, top_k=10, top_p=0.9, seed=seed), max_positions=32)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_end_token_ends_a_row_and_all_rows_end_the_text() -> None:
    model, tokens = model_of(LLAMA), prompt()
    free = generate(model, tokens, sampling=GREEDY, max_positions=32)
    eos = int(free[0, 7])  # the first row's third token
    found = generate(model, tokens, sampling=GREEDY, max_positions=32, eos_id=eos)
    for row, unbound in zip(found[:, 5:].tolist(), free[:, 5:].tolist(), strict=True):
        end = unbound.index(eos) + 1 if eos in unbound else len(unbound)
        assert row == (unbound[:end] + [eos] * len(unbound))[: len(row)]
    alone = generate(model, tokens[:1], sampling=GREEDY, max_positions=32, eos_id=eos)
    assert alone[0].tolist() == free[0, : free[0].tolist().index(eos, 5) + 1].tolist()


def test_padding_is_never_drawn() -> None:
    model = model_of(LLAMA, padded=64)
    with torch.no_grad():
        model.head.weight[VOCABULARY:] = 100.0
    assert generate(model, prompt(), sampling=Sampling(50, 5.0), max_positions=32).max() < VOCABULARY


def test_dropout_does_not_act_and_the_model_is_left_as_it_was() -> None:
    model = model_of(replace(GPT2, resid_pdrop=0.5)).train()
    written = generate(model, prompt(), sampling=GREEDY, max_positions=32)
    assert model.training
    assert torch.equal(written, generate(model.eval(), prompt(), sampling=GREEDY, max_positions=32))
    assert not model.training


def test_nothing_asked_for_is_nothing_written() -> None:
    assert torch.equal(generate(model_of(GPT2), prompt(), sampling=Sampling(0), max_positions=32), prompt())


@pytest.mark.parametrize(
    ("tokens", "what"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), r"\[1, 0\]; give \[sequences, tokens\], at least one token each"),
        (torch.zeros(3, dtype=torch.int64), r"tokens are \[3\]"),
        (torch.tensor([[1, VOCABULARY]]), "token id 23 is beyond the model's vocabulary of 23"),
        (torch.tensor([[1, -1]]), "token id -1 is beyond"),
    ],
)
def test_tokens_that_are_none_are_refused(tokens: Tensor, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        generate(model_of(GPT2), tokens, sampling=GREEDY, max_positions=32)


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    logits, sampling = torch.randn(1, 8), Sampling(temperature=0.7, top_k=6, top_p=0.95)
    drawn = next_tokens(logits.expand(40_000, -1), sampling=sampling, generator=torch.Generator().manual_seed(0))
    often = drawn.bincount(minlength=8) / 40_000
    torch.testing.assert_close(often, filtered(logits, sampling)[0].softmax(0), atol=0.01, rtol=0)


def test_top_p_keeps_the_likeliest_token_whatever_it_is() -> None:
    kept = filtered(torch.tensor([[0.0, 3.0, 1.0]]), Sampling(top_p=0.0)).isfinite()
    assert kept.tolist() == [[False, True, False]]


def test_every_wrong_number_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(-1, float("nan"), top_k=0, top_p=1.5)
    assert [line.split(":")[0] for line in caught.value.problems] == ["max_new_tokens", "temperature", "top_k", "top_p"]


def words(*, ending: bool = True) -> HFTokenizer:
    """Three words; adds an end token after each text if `ending`."""
    fast = FastTokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "</s>": 3}, unk_token="a"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    if ending:
        fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    return HFTokenizer({"tokenizer.json": fast.to_str().encode()}, name="words")


@pytest.mark.parametrize(
    ("tokenizer", "asked", "start"),
    [
        (CharTokenizer("\nab"), "ab", [1, 2]),
        (CharTokenizer("\nab"), "", [0]),
        (CharTokenizer("ab\n"), "", [2]),
        (CharTokenizer("ab"), "", [0]),
        (ByteTokenizer(), "", [10]),
        (words(), "b c", [1, 2]),
        (words(ending=False), "b c", [1, 2]),
        (words(), "", [3]),
    ],
)
def test_a_text_goes_on_from_its_prompt_or_begins_where_texts_begin(
    tokenizer: Tokenizer, asked: str, start: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def remember(model: CausalLM, tokens: Tensor, **_: Any) -> Tensor:
        seen.extend(tokens.tolist())
        return torch.cat((tokens, torch.tensor([[1]])), dim=1)

    monkeypatch.setattr(texts, "generate", remember)
    model = model_of(replace(GPT2, vocab_size=256), padded=256)
    written = texts.continue_text(
        model, tokenizer, asked, config=tiny_config(tmp_path), sampling=GREEDY, device=torch.device("cpu")
    )
    assert seen == [start]
    assert written.startswith(asked)
    assert written != asked


def test_a_prompt_beyond_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prompt: has token id 255, beyond the model's vocabulary of 23"):
        texts.continue_text(
            model_of(GPT2),
            ByteTokenizer(),
            b"\xff".decode("utf-8", "surrogateescape"),
            config=tiny_config(tmp_path),
            sampling=GREEDY,
            device=torch.device("cpu"),
        )


def test_tokens_that_the_tokenizer_lacks_are_left_out(tmp_path: Path) -> None:
    model, device = model_of(replace(GPT2, vocab_size=500), padded=500), torch.device("cpu")
    config, sampling = tiny_config(tmp_path), Sampling(60, temperature=9.0)
    for tokenizer in (ByteTokenizer(), CharTokenizer("ab")):
        written = texts.continue_text(model, tokenizer, "ab", config=config, sampling=sampling, device=device)
        assert written.startswith("ab")
        assert len(written) < 62


def test_positions_that_were_never_trained_are_not_used(tmp_path: Path) -> None:
    config = tiny_dict(tmp_path, model__model_config__n_positions=64)
    assert texts.context_length(config_from_dict(config)) == 16
    config["data_stages"].append({**config["data_stages"][0], "name": "2", "start_training_step": 5})
    config["data_stages"][1]["sequence_length"] = 48
    assert texts.context_length(config_from_dict(config)) == 48


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with checkpoints 4 and 8."""
    folder = tmp_path_factory.mktemp("trained")
    assert run_command(["train", str(tiny_yaml(folder, tokens__train_steps=8))]) == 0
    return folder / "run"


def told(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The line on stderr of `pentode generate`, which must end with `code` and write nothing else."""
    capsys.readouterr()
    assert run_command(["generate", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_generate_continues_each_prompt_in_a_way_of_its_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    texts = []
    for path in (run, run / "8", run / "4"):
        arguments = [str(path), "--prompt", "the ", "--prompt", "the ", "--max-new-tokens", "30"]
        assert run_command(["generate", *arguments]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        texts.append(out.split(f"\n{RULE}\n"))
    for first, second in texts:
        assert first.startswith("the ")
        assert second.startswith("the ")
        assert first != second.removesuffix("\n")
        assert len(first) == 34
    assert texts[0] == texts[1] != texts[2]


def test_generate_without_a_prompt_begins_a_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run_command(["generate", str(run), "--max-new-tokens", "40", "--temperature", "0"]) == 0
    assert len(capsys.readouterr().out) == 41


def test_a_terminal_is_not_repainted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pentode.generate.command.continue_text", lambda *_, **__: "red \x1b[31m\n")
    for terminal, shown in ((False, "red \x1b[31m\n"), (True, "red \\x1b[31m\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        assert next(generate_from(run, [""], sampling=GREEDY)) == shown


def test_generate_from_no_checkpoint_exits_66(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in told([str(tmp_path / "none")], 66, capsys)
    assert "holds no checkpoint" in told([str(tmp_path)], 66, capsys)
    (tmp_path / "metrics.jsonl").touch()
    assert "holds no checkpoint; give the folder of a checkpoint, or of a run" in told([str(tmp_path)], 66, capsys)


@pytest.mark.parametrize("name", ["weights-00000-of-00001.safetensors", "config.yaml", "pentode_tokenizer.json"])
def test_generate_from_a_damaged_checkpoint_exits_66(
    run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (run / "8").iterdir():
        data = path.read_bytes()
        half = len(data) // 2
        damaged = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        (tmp_path / path.name).write_bytes(damaged if path.name == name else data)
    assert f"{name} is damaged" in told([str(tmp_path)], 66, capsys)


def test_generate_from_a_run_passes_over_a_damaged_checkpoint_and_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in run.rglob("*.*"):
        copy = tmp_path / path.relative_to(run)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "8" / "config.yaml").write_text("general:")
    capsys.readouterr()
    assert run_command(["generate", str(tmp_path), "--max-new-tokens", "30", "--prompt", "the "]) == 0
    out, err = capsys.readouterr()
    assert "config.yaml has 8 bytes" in err
    assert "going on from step 4" in err
    assert out.startswith("the ")
    assert len(out) == 35
    assert (tmp_path / "8").is_dir()


def test_generate_from_dummy_data_exits_66(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_dict(
        tmp_path, tokens__train_steps=1, tokens__val_check_interval=-1, model__model_config__vocab_size=VOCABULARY
    )
    config["data_stages"][0]["data"] |= {"dataset": None, "validation_fraction": 0.0}
    save_yaml(config_from_dict(config), tmp_path / "dummy.yaml")
    assert run_command(["train", str(tmp_path / "dummy.yaml")]) == 0
    assert "trained on dummy data" in told([str(tmp_path / "run")], 66, capsys)


def test_generate_from_a_prompt_out_of_the_vocabulary_exits_65(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "character 'Q' (U+0051) at place 4 is not among" in told([str(run), "--prompt", "the Q"], 65, capsys)


@pytest.mark.parametrize(
    "wrong",
    [["--temperature", "-1"], ["--temperature", "nan"], ["--top-k", "0"], ["--top-p", "1.5"], ["--device", "moon"]],
)
def test_generate_with_a_wrong_option_exits_64(run: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run_command(["generate", str(run), *wrong]) == 64
    out, err = capsys.readouterr()
    assert out == ""
    assert wrong[0].strip("-").replace("-", "_") in err.replace("-", "_")


def test_a_run_on_any_characters_ends_with_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = "".join(map(str, np.random.default_rng(0).integers(10, size=400)))
    (tmp_path / "text.txt").write_text(digits)
    assert run_command(["train", str(tiny_yaml(tmp_path, tokens__train_steps=1))]) == 0
    sample = (tmp_path / "run" / "sample.txt").read_text()
    assert sample.startswith(digits[:16])
    assert len(sample) == 416
    assert sample in capsys.readouterr().out
