"""Loading configs: Nanotron's files, every problem at once with its place, overrides, former spellings, round trips."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pentode.config.dump import save_yaml, to_yaml
from pentode.config.kinds.datasets import PretrainDatasetsArgs, TextFileDatasetArgs
from pentode.config.kinds.gpt2 import GPT2Config
from pentode.config.kinds.llama import LlamaConfig
from pentode.config.kinds.optimizers import AdamWOptimizerArgs
from pentode.config.load import config_from_dict, load_config, load_with_notes
from pentode.config.schema import expand_run_name
from pentode.errors import ConfigError
from tests.helpers.config import SMALL, loaded, problems, problems_of, small

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "tests" / "data" / "tutorial_tiny_llama.yaml"


def test_the_tutorials_file_loads_unchanged() -> None:
    config, notes = load_with_notes(TUTORIAL)
    assert isinstance(config.model.model_config, LlamaConfig)
    assert config.model.model_config.parameter_count() == 12_368
    assert isinstance(config.optimizer.optimizer_factory, AdamWOptimizerArgs)
    assert isinstance(config.data_stages[1].data.dataset, PretrainDatasetsArgs)
    assert config.checkpoints.save_final_state is True  # left out there
    assert config.parallelism.tp_mode == "REDUCE_SCATTER"
    assert config.global_batch_size_in_tokens == 512
    (note,) = notes
    assert note.startswith(f"{TUTORIAL}: no effect here: ")
    assert "model.model_config.use_cache" in note
    assert "tokenizer_revision" not in note  # null there: nothing was asked for


def test_a_small_file_takes_nanotrons_defaults(tmp_path: Path) -> None:
    config = loaded(tmp_path, SMALL)
    assert config.general.run == "%date_%jobid"
    assert config.general.seed == 42
    assert config.model.dtype == "bfloat16"
    assert config.logging.log_level == "info"
    assert config.checkpoints.load_optimizer is True
    assert config.global_batch_size == 6
    assert config.world_size == 1
    assert config.optimizer.learning_rate_scheduler.learning_rate == 3e-4
    assert config.data_stages[0].data.dataset is None


BROKEN = """\
general: {project: 3, sed: 4}
parallelism:
  dp: 1
  tp: 1
  pp: 0
  pp_engine: 1f2b
model:
  model_config:
    is_llama_config: true
    num_attention_heads: 4
    num_key_value_heads: 3
    hidden_sise: 20
    rope_scaling: {rope_type: yarn, factor: 0.5}
  init_method: {std: 0.02}
checkpoints: {checkpoints_path: here, checkpoint_interval: 5}
tokens:
  sequence_length: 10.5
  train_steps: ten
  micro_batch_size: 2
optimizer:
  learning_rate: 3e-4
  optimizer_factory: {}
  zero_stage: 2
  weight_decay: .nan
  clip_grad: null
  accumulate_grad_in_fp32: 1
  learning_rate_scheduler: {learning_rate: 3e-4}
data_stages:
- {name: a, start_training_step: 1, data: {dataset: null}}
- {name: a, start_training_step: 2, data: {dataset: {text_file: [x]}}}
"""


def test_all_problems_come_at_once_each_with_line_path_and_remedy(tmp_path: Path) -> None:
    assert problems(tmp_path, BROKEN) == [
        "c.yaml:1: general.project: 3 is not text",
        "c.yaml:1: general.sed: unknown key; did you mean seed?",
        "c.yaml:5: parallelism.pp: 0; must be at least 1",
        "c.yaml:6: parallelism.pp_engine: '1f2b'; must be afab or 1f1b or interleaved; did you mean 1f1b?",
        "c.yaml:11: model.model_config.num_key_value_heads: 3 does not divide model.model_config.num_attention_heads=4",
        "c.yaml:12: model.model_config.hidden_sise: unknown key; did you mean hidden_size?",
        "c.yaml:13: model.model_config.rope_scaling.factor: 0.5; must be at least 1",
        "c.yaml:13: model.model_config.rope_scaling.rope_type: 'yarn'; must be default or linear or llama3",
        "c.yaml:16: tokens.batch_accumulation_per_replica: missing; needed: micro-batches in a step",
        "c.yaml:17: tokens.sequence_length: 10.5 is not a whole number",
        "c.yaml:18: tokens.train_steps: 'ten' is not a whole number",
        "c.yaml:21: optimizer.learning_rate: unknown key; did you mean "
        "optimizer.learning_rate_scheduler.learning_rate?",
        "c.yaml:22: optimizer.optimizer_factory: nothing here says which kind this is; write `name:` adamW or sgd",
        "c.yaml:23: optimizer.zero_stage: 2: sharding gradients and weights (ZeRO-2 and 3) is not built yet; "
        "use 0 or 1",
        "c.yaml:24: optimizer.weight_decay: NaN is not a finite number",
        "c.yaml:26: optimizer.accumulate_grad_in_fp32: 1 is not true or false",
        "c.yaml:30: data_stages.1.data.dataset.text_file: a list is not text",
        "c.yaml:30: data_stages.1.name: 'a' is also the name of data_stages.0",
    ]


def test_a_value_of_several_types_is_one_problem() -> None:
    stage = {"name": "a", "start_training_step": 1, "data": {"dataset": {"hf_dataset_or_datasets": 3}}}
    found = problems_of(small() | {"data_stages": [stage], "tokenizer": {"tokenizer_name_or_path": "t"}})
    assert found == [
        "data_stages.0.data.dataset.hf_dataset_or_datasets: 3 is not text or a list or a section of names and values"
    ]
    stage["data"]["dataset"]["hf_dataset_or_datasets"] = ["a", 3]
    assert problems_of(small() | {"data_stages": [stage], "tokenizer": {"tokenizer_name_or_path": "t"}}) == [
        "data_stages.0.data.dataset.hf_dataset_or_datasets.1: 3 is not text"
    ]


def test_a_missing_or_strange_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_config(tmp_path / "binary")
    assert problems(tmp_path, "") == ["c.yaml: holds no sections; a config starts with `general:`"]
    assert problems(tmp_path, "- 1") == ["c.yaml: holds no sections; a config starts with `general:`"]


def test_overrides_change_values_by_full_path(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        SMALL,
        "tokens.train_steps=60",
        "data_stages.0.data.seed=1",
        "checkpoints.checkpoints_path=/x",
        "data_stages.0.data.dataset={text_file: t.txt, tokenization: byte}",
        "logging.log_level=DEBUG",
        "optimizer.learning_rate_scheduler.learning_rate=1e-2",
        "general.run=a=b",
        "metrics_logging.log_detail_interval=7",
    )
    assert config.tokens.train_steps == 60
    assert config.data_stages[0].data.seed == 1
    assert config.checkpoints.checkpoints_path == Path("/x")
    assert config.data_stages[0].data.dataset == TextFileDatasetArgs(text_file="t.txt", tokenization="byte")
    assert config.logging.log_level == "debug"
    assert config.optimizer.learning_rate_scheduler.learning_rate == 1e-2
    assert config.general.run == "a=b"
    assert config.metrics_logging is not None
    assert config.metrics_logging.log_detail_interval == 7


def test_wrong_overrides_say_so(tmp_path: Path) -> None:
    found = problems(
        tmp_path, SMALL, "foo", "data_stages.3.name=x", "tokens={", "general.project.x=1", "tokens.train_step=3"
    )
    assert found[0] == "command line: foo: not an override; write section.key=value"
    assert found[1] == "command line: data_stages.3.name: data_stages is a list of 1; count its items from 0"
    assert found[2].startswith("command line: tokens:1: ")
    assert found[3] == "command line: general.project.x: general.project is not a section"
    assert found[4] == "command line: tokens.train_step: unknown key; did you mean train_steps?"


def test_an_override_corrects_the_file(tmp_path: Path) -> None:
    assert loaded(tmp_path, SMALL.replace("dp: 1", "dp: 8"), "parallelism.dp=1").parallelism.dp == 1


def test_a_base_says_what_the_file_does_not(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(SMALL)
    config = load_config(path, base={"general": {"project": "other", "seed": 7}, "tokenizer": {}})
    assert (config.general.project, config.general.seed) == ("p", 7)


def test_null_means_the_default_where_null_is_no_value() -> None:
    config = config_from_dict(small(general={"seed": None, "run": None}, tokens={"val_check_interval": None}))
    assert (config.general.seed, config.general.run, config.tokens.val_check_interval) == (42, "%date_%jobid", -1)
    assert config_from_dict(small() | {"logging": None}).logging.log_level == "info"
    assert config.optimizer.clip_grad is None
    assert problems_of(small(general={"project": None})) == ["general.project: null is not text"]


def test_stages_are_ordered_by_their_first_step(tmp_path: Path) -> None:
    late = "- {name: late, start_training_step: 4, data: {dataset: null}}\n"
    config = loaded(tmp_path, SMALL.replace("- {name: a", late + "- {name: a"))
    assert [stage.name for stage in config.data_stages] == ["a", "late"]
    found = problems(tmp_path, SMALL.replace("- {name: a", late.replace("null", "{text_file: 3}") + "- {name: a"))
    assert found == ["c.yaml:16: data_stages.1.data.dataset.text_file: 3 is not text"]
    found = problems(tmp_path, SMALL.replace("- {name: a", "- {name: late, start_training_step: 4}\n- {name: a"))
    assert found == ["c.yaml:16: data_stages.1.data: missing; needed: what is read"]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"is_qwen2_config": True, "hidden_size": 3}, "Qwen2 shapes are not built yet; use llama or gpt2"),
        ({"is_mamba_config": True}, "Mamba shapes are not built yet; use llama or gpt2"),
        ({"type": "lama"}, "type 'lama' is unknown; use llama or gpt2"),
        ({"vocab_size": 256}, "nothing here says which kind this is; write `type:` llama or gpt2"),
    ],
)
def test_a_shape_of_no_known_kind_is_one_line(shape: dict[str, Any], words: str) -> None:
    assert problems_of(small(model={"model_config": shape})) == [f"model.model_config: {words}"]


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ({"type": "GPT2", "vocab_size": 5}, GPT2Config),
        ({"is_gpt2_config": True, "vocab_size": 5, "n_positions": 99}, GPT2Config),
        ({"n_embd": 12, "vocab_size": 5}, GPT2Config),
        ({"is_llama_config": True, "vocab_size": 5}, LlamaConfig),
        ({"hidden_size": 64, "vocab_size": 5}, LlamaConfig),
    ],
)
def test_a_kind_is_known_by_type_tag_or_its_own_keys(shape: dict[str, Any], kind: type) -> None:
    assert isinstance(config_from_dict(small(model={"model_config": shape})).model.model_config, kind)


def test_config_from_dict_changes_nothing_it_was_given() -> None:
    data = small(tokenizer={"tokenizer_revision": None})
    before = yaml.safe_dump(data)
    config_from_dict(data)
    assert yaml.safe_dump(data) == before


def test_the_run_name_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_from_dict(small(general={"run": "x_%jobid_%date"}))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert expand_run_name(config).startswith("x_local_20")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert expand_run_name(config).startswith("x_77_20")
    assert config.general.run == "x_%jobid_%date"


@pytest.mark.parametrize(
    "name", sorted(str(p.relative_to(ROOT)) for d in ("configs", "examples") for p in (ROOT / d).rglob("*.yaml"))
)
def test_every_shipped_yaml_loads_and_loads_back(name: str, tmp_path: Path) -> None:
    config, notes = load_with_notes(ROOT / name)
    assert notes == []
    save_yaml(config, tmp_path / "again.yaml")
    assert load_with_notes(tmp_path / "again.yaml") == (config, [])
    assert to_yaml(load_config(tmp_path / "again.yaml")) == to_yaml(config)


def test_the_python_example_writes_the_shipped_files(tmp_path: Path) -> None:
    shipped = ROOT / "examples" / "llama"
    script = tmp_path / "config_tiny_llama.py"
    script.write_text((shipped / script.name).read_text())
    subprocess.run([sys.executable, str(script)], check=True, cwd=ROOT)
    written = {path.name: path.read_text() for path in tmp_path.glob("*.yaml")}
    assert written == {path.name: path.read_text() for path in shipped.glob("*.yaml")}
    eight, one, tutorial = map(load_config, (*(tmp_path / name for name in sorted(written)), TUTORIAL))
    assert eight.model == one.model == tutorial.model
    assert (eight.world_size, one.world_size) == (8, 1)
    assert one.tokens == tutorial.tokens


def test_nanotrons_name_of_the_example_is_the_example() -> None:
    names = ("examples/config_tiny_llama.yaml", "examples/llama/config_tiny_llama.yaml")
    assert len({(ROOT / name).read_bytes() for name in names}) == 1


def test_doremi_is_refused_with_the_reason(tmp_path: Path) -> None:
    [problem] = problems(tmp_path, SMALL + "doremi: {smoothing_param: 0.001}\n")
    assert problem.endswith("; DoReMi is not built yet; use null")
    assert ": doremi: " in problem


def test_loading_needs_no_torch_and_is_quick() -> None:
    code = (
        "import sys, time; start = time.process_time(); from pathlib import Path; import pentode.config.load as load;"
        "imported = time.process_time(); load.load_config(Path(sys.argv[1]));"
        "print(imported - start, time.process_time() - start, 'torch' in sys.modules or 'numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(TUTORIAL)]
    runs = [
        subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split() for _ in range(3)
    ]
    assert all(run[2] == "False" for run in runs)
    assert min(float(run[0]) for run in runs) < 1.0  # processor seconds; 0.25 s on an idle laptop core
    assert min(float(run[1]) for run in runs) < 1.5
