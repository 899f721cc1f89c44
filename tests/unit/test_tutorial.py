"""Nanotron's tutorial, replayed: its YAML on local data gives its log, message for message."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pentode.cli import run_command
from tests.helpers.source import ROOT
from tests.helpers.tiny import WORDS, text

YAML = ROOT / "tests" / "data" / "tutorial_tiny_llama.yaml"

MESSAGES = """
Config:
Model Config:
Building model..
Setting PP block ranks...
Total number of parameters: 12.4K (0.02MiB)
Local number of parameters: 12.4K (0.02MiB)
[After model building] Memory usage: *MiB. Peak allocated: *MiB Peak reserved: *MiB
No checkpoint path provided.
Parametrizing model parameters using StandardParametrizator
[Optimizer Building] Using LearningRateForSP as learning rate
[Training Plan] Stage Stable Training Stage has 9 remaining training steps and has consumed 0 samples
Using `datasets` library
Loading tokenizer from * and transformers/hf_hub versions (*)
[Training Plan] Stage Annealing Phase has 6 remaining training steps and has consumed 0 samples
[Training Plan] There are 2 training stages
[Stage Stable Training Stage] start from step 1
[Stage Annealing Phase] start from step 10
[Start training] datetime: * | mbs: 2 | grad_accum: 1 | global_batch_size: 2 | sequence_length: 256 | train_steps: 15 | start_iteration_step: 0 | consumed_train_samples: 0
Resuming training from stage Stable Training Stage, it has trained for 0 samples and has 9 remaining train steps
 Memory usage: *MiB. Peak allocated *MiB. Peak reserved: *MiB
iteration: 1 / 15 | *
 Memory usage: *MiB. Peak allocated *MiB. Peak reserved: *MiB
iteration: 2 / 15 | *
iteration: 9 / 15 | *
[Training Stage: Annealing Phase] Clearing the previous training stage's dataloader and datasets from memory
Using `datasets` library
Loading tokenizer from * and transformers/hf_hub versions (*)
iteration: 10 / 15 | *
Saving checkpoint at *checkpoints/10
iteration: 11 / 15 | *
iteration: 15 / 15 | *
"""  # noqa: E501  a log line is as long as it is

FIELDS = (
    "consumed_tokens elapsed_time_per_iteration_ms tokens_per_sec tokens_per_sec_per_gpu global_batch_size lm_loss lr "
    "model_tflops_per_gpu hardware_tflops_per_gpu grad_norm"
).split()
DISK_FIELDS = "hd_total_memory_tb hd_used_memory_tb hd_free_memory_tb".split()
RATES = (
    "0.00015 0.0003 0.000296 0.000283 0.000264 0.000237 0.000206 0.000172 0.000138 0.000104 7.26e-05 4.65e-05 2.66e-05 "
    "1.42e-05 1e-05"
).split()
PREFIX = re.compile(r"\d\d/\d\d/\d{4} \d\d:\d\d:\d\d \[(INFO|WARNING)\|DP=0\|PP=0\|TP=0\]: (.*)")


def local_data(folder: Path) -> list[str]:
    """A dataset and a word tokenizer in `folder`, and the overrides that name them."""
    with (folder / "texts.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text(words=200, seed=i)}) + "\n" for i in range(60))
    words = {word: i for i, word in enumerate(["[UNK]", "<s>", "</s>", *sorted(set(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (folder / "words").mkdir()
    tokenizer.save(str(folder / "words" / "tokenizer.json"))
    return [
        f"data_stages.0.data.dataset.hf_dataset_or_datasets={folder / 'texts.jsonl'}",
        f"data_stages.1.data.dataset.hf_dataset_or_datasets={folder / 'texts.jsonl'}",
        f"tokenizer.tokenizer_name_or_path={folder / 'words'}",
        f"checkpoints.checkpoints_path={folder / 'checkpoints'}",
        "general.device=cpu",
    ]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every line that the run printed."""
    folder = tmp_path_factory.mktemp("tutorial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "home"))
        assert run_command(["train", str(YAML), *local_data(folder)]) == 0
    [log] = (folder / "checkpoints" / "logs").glob("*.log")
    return log.read_text(encoding="utf-8").splitlines()


def test_the_messages_come_in_the_tutorials_order(lines: list[str]) -> None:
    rest = iter(lines)
    for message in MESSAGES.strip("\n").splitlines():
        pattern = ".*".join(map(re.escape, message.split("*")))
        found = next((line for line in rest if (match := PREFIX.match(line)) and re.fullmatch(pattern, match[2])), None)
        assert found is not None, f"missing, or not in its place: {message}"


def test_iteration_lines_have_the_tutorials_fields_in_its_order(lines: list[str]) -> None:
    found = [line.split(" | ") for line in lines if "iteration: " in line]
    assert len(found) == 15
    for step, (_, *items) in enumerate(found, 1):
        names = [item.split(": ")[0] for item in items]
        assert names == FIELDS + (DISK_FIELDS if step < 5 or step == 11 else [])


def test_the_printed_learning_rates_are_the_tutorials(lines: list[str]) -> None:
    assert [match[1] for line in lines if (match := re.search(r"\| lr: (\S+)", line))] == RATES


def test_the_checkpoint_line_is_a_warning(lines: list[str]) -> None:
    assert [PREFIX.match(line)[1] for line in lines if "Saving checkpoint at" in line] == ["WARNING", "WARNING"]
