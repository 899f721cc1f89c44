"""Former spellings: older Nanotron files, keys that never acted, the nanoGPT2 guide's flat keys."""

from pathlib import Path

from pentode.config.kinds.datasets import NanosetDatasetsArgs, TextFileDatasetArgs
from pentode.config.kinds.gpt2 import GPT2Config
from pentode.config.kinds.llama import LlamaConfig, RopeScaling
from pentode.config.kinds.optimizers import AdamWOptimizerArgs
from pentode.config.load import config_from_dict, load_with_notes
from tests.helpers.config import SMALL, loaded, problems, problems_of, small

OLD = {
    "data": {"dataset": {"hf_dataset_or_datasets": "wiki"}, "seed": 6, "num_loading_workers": 1},
    "tokenizer": {"tokenizer_name_or_path": "gpt2", "tokenizer_revision": None},
}


def test_older_spellings_are_translated() -> None:
    data = small(parallelism={"recompute_granularity": "SELECTIVE"}, model={"dtype": "torch.float32"}) | OLD
    del data["data_stages"]
    data["optimizer"] |= data["optimizer"].pop("optimizer_factory")
    config = config_from_dict(data)
    assert config.data_stages[0].data.seed == 6
    assert config.data_stages[0].start_training_step == 1
    assert config.optimizer.optimizer_factory == AdamWOptimizerArgs(
        adam_eps=1e-8, adam_beta1=0.9, adam_beta2=0.95, torch_adam_is_fused=True
    )
    assert config.model.dtype == "float32"


def test_a_section_of_folders_is_folders_and_weights() -> None:
    stage = {"name": "a", "start_training_step": 1, "data": {"dataset": {"dataset_folder": {"/a": 0.3, "/b": 0.7}}}}
    (problem,) = problems_of(small() | {"data_stages": [stage]})
    assert problem.startswith(
        "data_stages.0.data.dataset: NanosetDatasetsArgs: reading this kind of dataset is not built"
    )
    assert NanosetDatasetsArgs(dataset_folder=["/a"], dataset_weights=[1.0]).type == "nanoset"


def test_a_mistake_in_a_translated_section_keeps_its_line(tmp_path: Path) -> None:
    text = SMALL[: SMALL.index("data_stages")] + "data:\n  dataset:\n    text_file: t.txt\n  sead: 3\n"
    assert problems(tmp_path, text) == ["c.yaml:18: data_stages.0.data.sead: unknown key; did you mean seed?"]


def test_keys_without_effect_are_told_once_and_refused_where_they_would_matter(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(SMALL.replace("vocab_size: 256", "vocab_size: 256, use_cache: false, pretraining_tp: 1"))
    notes = load_with_notes(path)[1]
    assert notes == [f"{path}: no effect here: model.model_config.pretraining_tp, model.model_config.use_cache"]
    assert problems(tmp_path, SMALL.replace("vocab_size: 256", "vocab_size: 256, sliding_window_size: 4")) == [
        "c.yaml:4: model.model_config.sliding_window_size: 4; part of Qwen2 shapes, which are not built yet; use null"
    ]


def test_rope_scaling_is_read_in_both_spellings() -> None:
    scaling = {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    }
    for key in ("type", "rope_type"):
        data = small()
        data["model"]["model_config"]["rope_scaling"] = scaling | {key: "llama3"}
        shape = config_from_dict(data).model.model_config
        assert isinstance(shape, LlamaConfig)
        assert shape.rope_scaling == RopeScaling(rope_type="llama3", factor=32.0)


def test_the_guides_flat_keys_become_a_gpt2_run(tmp_path: Path) -> None:
    flat = "vocab_size: 256\nblock_size: 32\nn_layer: 2\nn_head: 2\nn_embd: 16\ndropout: 0.2\nbatch_size: 8\n"
    flat += (
        "learning_rate: 1e-3\nmax_iters: 50\neval_iters: 3\neval_interval: 10\ndevice: 'cpu'\nmixed_precision: true\n"
    )
    flat += "save_checkpoint: true\ncheckpoint_interval: 20\ncheckpoint_dir: ./ckpt\ndata_path: t.txt\n"
    config = loaded(tmp_path, flat, "tokens.train_steps=60")
    shape = config.model.model_config
    assert isinstance(shape, GPT2Config)
    assert (shape.vocab_size, shape.n_positions, shape.n_layer, shape.n_head, shape.n_embd) == (256, 32, 2, 2, 16)
    assert (shape.embd_pdrop, shape.resid_pdrop, shape.attn_pdrop) == (0.2, 0.2, 0.2)
    assert config.data_stages[0].data.dataset == TextFileDatasetArgs(text_file="t.txt", tokenization="byte")
    assert config.data_stages[0].data.validation_fraction == 0.1
    assert (config.tokens.sequence_length, config.tokens.micro_batch_size, config.tokens.train_steps) == (32, 8, 60)
    assert (config.tokens.val_check_interval, config.tokens.limit_val_batches) == (10, 3)
    assert (config.general.device, config.model.dtype) == ("cpu", "bfloat16")
    assert (config.checkpoints.checkpoint_interval, config.checkpoints.save_final_state) == (20, True)
    assert config.checkpoints.checkpoints_path == Path("ckpt")
    assert config.optimizer.learning_rate_scheduler.min_decay_lr is None  # constant, as the guide's


def test_flat_keys_left_out_take_the_guides_values_and_mistakes_keep_their_lines(tmp_path: Path) -> None:
    config = loaded(tmp_path, "n_layer: 2\nsave_checkpoint: false\n")
    assert config.model.model_config.num_layers == 2
    assert config.model.model_config.vocab_size == -1
    assert config.checkpoints.checkpoint_interval > config.tokens.train_steps
    assert config.checkpoints.save_final_state is False
    assert problems(tmp_path, "n_layers: 4\nn_embd: 65\nbatch_size: x\nmixed_precision: 1\n") == [
        "c.yaml: mixed_precision: 1 is not true or false",
        "c.yaml:1: n_layers: unknown key; did you mean n_layer?",
        "c.yaml:2: model.model_config.n_head: 4 does not divide model.model_config.n_embd=65",
        "c.yaml:3: tokens.micro_batch_size: 'x' is not a whole number",
    ]
