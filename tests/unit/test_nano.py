"""The nanoGPT2 guide's names do what the guide shows, and say what is wrong where something is."""

import re
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from pentode.cli import run_command
from pentode.config.load import config_from_dict, load_config
from pentode.errors import ConfigError, DataError, Interrupted
from pentode.nano import GPT, PRESETS, CharDataset, NanoConfig, Trainer, get_config
from pentode.train import loop
from tests.helpers.source import ROOT
from tests.helpers.tiny import rows, text, weights

LINE = re.compile(r"iter (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4}) \(time: \d+\.\d{2}s\) [\d,]+ tokens/s")
TEXT = text()


def tiny(folder: Path, **changes: Any) -> NanoConfig:
    config = replace(
        get_config("nano"),
        vocab_size=30,
        block_size=16,
        n_layer=2,
        n_head=2,
        n_embd=16,
        dropout=0.1,
        batch_size=8,
        max_iters=6,
        eval_iters=2,
        eval_interval=3,
        device="cpu",
        checkpoint_interval=3,
        checkpoint_dir=str(folder / "run"),
    )
    return replace(config, **changes)


def sets(block_size: int = 16) -> tuple[CharDataset, CharDataset]:
    return CharDataset(TEXT, block_size).split(0.9)


def state_of(model: GPT) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def problems(caught: pytest.ExceptionInfo[ConfigError]) -> str:
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_files_in_configs(name: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    theirs = yaml.safe_load(path.read_text())
    ours = asdict(get_config(name))
    assert theirs.pop("vocab_size") == -1  # which a GPT that sees no text cannot take from it
    assert theirs.pop("data_path") == "pydoc_data.topics"
    theirs["learning_rate"] = float(theirs["learning_rate"])  # YAML 1.1 reads 1e-3 as a word
    assert theirs == {key: value for key, value in ours.items() if key != "vocab_size"}
    assert config_from_dict(ours | {"vocab_size": -1}) == load_config(path)


def test_a_preset_is_a_copy_that_knows_its_keys() -> None:
    config = get_config("nano")
    config.n_layer = 99
    assert get_config("nano").n_layer == 4
    with pytest.raises(AttributeError, match="learning_rte"):
        config.learning_rte = 1e-3
    with pytest.raises(ConfigError, match="get_config: 'nono' is not one of nano, small, base"):
        get_config("nono")


def test_a_dataset_gives_a_text_and_the_same_text_one_character_on() -> None:
    dataset = CharDataset("hello world", block_size=4)
    x, y = dataset[2]
    assert (dataset.decode(x), dataset.decode(y)) == ("llo ", "lo w")
    assert (x.dtype, dataset.vocab_size, len(dataset)) == (torch.int64, 8, 7)
    assert dataset.decode(dataset.encode("doll")) == "doll"
    assert sum(1 for _ in torch.utils.data.DataLoader(dataset, batch_size=2)) == 4
    first, last = dataset.split(0.5)
    assert (first.text, last.text) == ("hello ", "world")
    assert first.vocab_size == last.vocab_size == 8
    assert len(CharDataset("ab", block_size=4)) == 0
    with pytest.raises(IndexError, match="item 7 of 7"):
        dataset[7]


def test_the_guide_trains_prints_saves_and_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path, max_iters=40, eval_interval=20, checkpoint_interval=20, learning_rate=1e-2)
    train_set, val_set = sets()
    model = GPT(config)
    before = state_of(model)
    Trainer(model, config).train(train_set, val_set)

    out = capsys.readouterr().out
    printed = [LINE.fullmatch(line) for line in out.splitlines() if not line.endswith(("/20", "/40"))]
    assert all(printed), out
    assert [int(match[1]) for match in printed] == [20, 40]
    assert float(printed[1][3]) < float(printed[0][3]) < np.log(30)

    assert not same(state_of(model), before)
    assert {row["step"]: row["val_loss"] for row in rows(tmp_path / "run")}[40] == pytest.approx(
        float(printed[1][3]), abs=1e-4
    )
    path = tmp_path / "final_model.pt"
    torch.save({"model_state_dict": model.state_dict(), "config": config}, path)
    saved = torch.load(path, weights_only=True)
    assert saved["config"] == config
    again = GPT(saved["config"])
    again.load_state_dict(saved["model_state_dict"])
    assert same(state_of(again), state_of(model))

    capsys.readouterr()
    start = ["--prompt", "the ", "--max-new-tokens", "30", "--temperature", "0"]
    assert run_command(["generate", str(tmp_path / "run"), *start]) == 0
    idx = torch.tensor([train_set.encode("the ")])
    written = model.generate(idx, max_new_tokens=30, temperature=0)
    assert capsys.readouterr().out == train_set.decode(written[0]) + "\n"


def test_what_generate_takes_acts(tmp_path: Path) -> None:
    model, idx = GPT(tiny(tmp_path)), torch.zeros(2, 3, dtype=torch.int64)
    drawn = model.generate(idx, 40, temperature=2.0, top_k=5)
    assert drawn.shape == (2, 43)  # which is more than block_size
    assert torch.equal(drawn, model.generate(idx, 40, temperature=2.0, top_k=5))
    assert not torch.equal(drawn, model.generate(idx, 40, temperature=2.0, top_k=5, seed=1))
    assert torch.equal(model.generate(idx, 40, top_k=1), model.generate(idx, 40, temperature=0))
    assert not torch.equal(model.generate(idx, 40, temperature=2.0), drawn)
    (model(drawn[:, :16], drawn[:, 1:17])[1]).backward()  # what was generated can be learned from
    with pytest.raises(ConfigError, match="temperature: -1"):
        model.generate(idx, 1, temperature=-1)


def test_a_forward_pass_gives_logits_and_their_mean_loss(tmp_path: Path) -> None:
    model = GPT(tiny(tmp_path, dropout=0.5))
    x, y = (torch.stack(rows) for rows in zip(*[sets()[0][i] for i in range(4)], strict=True))
    assert model(x)[1] is None
    assert not torch.equal(model(x)[0], model(x)[0])  # dropout
    logits, loss = model.eval()(x, y)
    assert logits.shape == (4, 16, 30)
    assert torch.equal(logits, model(x)[0])
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), y.flatten()))
    loss.backward()
    assert all(param.grad.abs().sum() > 0 for param in model.parameters())


def test_resuming_gives_the_run_that_was_not_interrupted(tmp_path: Path) -> None:
    train_set, val_set = sets()
    whole, half = tiny(tmp_path / "whole"), tiny(tmp_path / "half", max_iters=3)
    Trainer(GPT(whole), whole).train(train_set, val_set)
    Trainer(GPT(half), half).train(train_set, val_set)
    half.max_iters = 6
    model = GPT(half)
    Trainer(model, half, resume=True).train(train_set, val_set)
    assert weights(tmp_path / "half" / "run", 6) == weights(tmp_path / "whole" / "run", 6)
    assert [row["step"] for row in rows(tmp_path / "half" / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_complete_run_is_said_to_be_complete_and_gives_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, (train_set, val_set) = tiny(tmp_path), sets()
    trained, fresh = GPT(config), GPT(config)
    Trainer(trained, config, resume=True).train(train_set, val_set)  # there is nothing yet to go on from
    before = weights(tmp_path / "run", 6)
    capsys.readouterr()
    Trainer(fresh, config, resume=True).train(train_set, val_set)
    assert capsys.readouterr().out == "iter 6: complete; raise config.max_iters to go on\n"
    assert same(state_of(fresh), state_of(trained))
    assert weights(tmp_path / "run", 6) == before


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    config, (train_set, val_set) = tiny(tmp_path), sets()
    Trainer(GPT(config), config).train(train_set, val_set)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}
    model = GPT(config)
    before = state_of(model)
    with pytest.raises(ConfigError, match=r"run holds a run; use another folder, or Trainer\(\.\.\., resume=True\)"):
        Trainer(model, config).train(train_set, val_set)
    with pytest.raises(ConfigError, match="was trained on another text; use another folder"):
        Trainer(model, config, resume=True).train(val_set, val_set)
    assert same(state_of(model), before)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")} == files


def test_save_checkpoint_false_writes_nothing_and_a_model_can_be_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny(tmp_path, save_checkpoint=False, checkpoint_dir="checkpoints")
    model = GPT(config)
    for _ in range(2):
        before = state_of(model)
        Trainer(model, config).train(*sets())
        assert not same(state_of(model), before)
    assert list(tmp_path.iterdir()) == []
    assert len(LINE.findall(capsys.readouterr().out)) == 4


@pytest.mark.parametrize("saves", [False, True])
def test_ctrl_c_leaves_the_model_as_far_as_it_came(
    saves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = tiny(tmp_path, save_checkpoint=False, max_iters=3)
    want = GPT(straight)
    Trainer(want, straight).train(*sets())

    monkeypatch.setattr(loop, "validation_loss", lambda *_: signal.raise_signal(signal.SIGINT))  # after step 3
    config = tiny(tmp_path, save_checkpoint=saves)
    model = GPT(config)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(Interrupted if saves else KeyboardInterrupt):
            Trainer(model, config).train(*sets())
    finally:
        signal.signal(signal.SIGINT, before)
    assert same(state_of(model), state_of(want))
    assert (tmp_path / "run" / "3").is_dir() == saves
    assert (tmp_path / "run").exists() == saves


def test_without_validation_data_the_line_has_no_val_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path, eval_interval=0, save_checkpoint=False)
    Trainer(GPT(config), config).train(sets()[0])
    assert re.fullmatch(r"iter 6: train loss \d\.\d{4} \(time: \d+\.\d\ds\) [\d,]+ tokens/s\n", capsys.readouterr().out)


def test_a_validation_text_is_read_by_the_training_texts_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, train_set, said = tiny(tmp_path, save_checkpoint=False), sets()[0], "the model reads " * 9
    lines = []
    for val_set in (CharDataset(said, 16), CharDataset(said, 16, tokenizer=train_set.tokenizer)):
        Trainer(GPT(config), config).train(train_set, val_set)
        lines.append([match[3] for match in LINE.finditer(capsys.readouterr().out)])
    assert lines[0] == lines[1]
    with pytest.raises(DataError, match="character '#'"):
        Trainer(GPT(config), config).train(train_set, CharDataset("#" + TEXT, 16))


def test_data_that_do_not_fit_are_refused_before_training(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    trainer, good = Trainer(GPT(config), config), sets()[0]
    with pytest.raises(ConfigError) as caught:
        trainer.train(TEXT, sets(32)[1])
    assert problems(caught) == (
        "train_dataset: a str; give a CharDataset(text, config.block_size)\n"
        "block_size: val_dataset has 32, the config 16; make them equal"
    )
    with pytest.raises(DataError, match="val_dataset: has 12 tokens, needs 17"):
        trainer.train(good, CharDataset(TEXT[:12], 16, tokenizer=good.tokenizer))
    with pytest.raises(DataError, match="train_dataset: has 0 tokens"):
        trainer.train(CharDataset("", 16))
    small = tiny(tmp_path, vocab_size=5)
    with pytest.raises(ConfigError, match="train_dataset has 19 characters, the model knows 5; set config"):
        Trainer(GPT(small), small).train(good)
    assert list(tmp_path.iterdir()) == []


def test_a_model_needs_its_vocabulary_and_the_shape_it_was_built_with(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size: -1; set config\.vocab_size = dataset\.vocab_size"):
        GPT(tiny(tmp_path, vocab_size=-1))
    with pytest.raises(ConfigError, match="3 does not divide"):
        GPT(tiny(tmp_path, n_head=3))
    config = tiny(tmp_path)
    model = GPT(config)
    config.n_layer, config.n_embd = 3, 32
    with pytest.raises(ConfigError) as caught:
        Trainer(model, config).train(sets()[0])
    assert problems(caught) == (
        "n_layer: 3, but the model was built with 2; set it before GPT(config)\n"
        "n_embd: 32, but the model was built with 16; set it before GPT(config)"
    )


def test_a_gpu_that_is_not_there_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="cuda, but torch finds no GPU here; use device cpu, or auto"):
        GPT(tiny(tmp_path, device="cuda"))
    config = tiny(tmp_path)
    model = GPT(config)
    config.device = "cuda"
    with pytest.raises(ConfigError, match="no GPU here"):
        Trainer(model, config).train(sets()[0])


def test_mixed_precision_trains_in_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path, mixed_precision=True)
    model = GPT(config)
    Trainer(model, config).train(*sets())
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert len(LINE.findall(capsys.readouterr().out)) == 2
