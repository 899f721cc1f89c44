"""Rules between sections, what is not built yet, warnings, and what a config means."""

from typing import Any

import pytest

from pentode.config.check import NOT_BUILT, problems, warnings
from pentode.config.editor import field_paths
from pentode.config.load import config_from_dict
from pentode.config.meaning import meaning
from pentode.config.part import Absent, Unknown
from tests.helpers.changed_config import GPT2, HF_TEXT, LLAMA, data, found

SHAPE = "model.model_config"
SCHEDULE = "optimizer.learning_rate_scheduler"
STAGE = "data_stages.0"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"parallelism__context_parallel_size": 2},
            "parallelism.context_parallel_size: 2: context parallelism is not built yet; use 1",
        ),
        (
            {"optimizer__zero_stage": 2},
            "optimizer.zero_stage: 2: sharding gradients and weights (ZeRO-2 and 3) is not built yet; use 0 or 1",
        ),
        (
            {"parallelism__recompute_layer": "full"},
            "parallelism.recompute_layer: 'full'; must be true or false or selective",
        ),
        (
            {"model__init_method": {"use_mup": True}},
            "model.init_method: SpectralMupInit: this way to get the first weights is not built yet; use RandomInit",
        ),
        (
            {"model__init_method__scaling_method": "layer_index"},
            "model.init_method.scaling_method: LAYER_INDEX: this scaling is not built yet; use NUM_LAYERS or NONE",
        ),
        ({"profiler": {}}, "profiler: ProfilerArgs: profiling is not built yet; use null"),
        ({"lighteval": {}}, "lighteval: LightEvalConfig: evaluation by lighteval is not built yet; use null"),
        (
            {"metrics_logging": {"log_level": 1}},
            "metrics_logging.log_level: 1: statistics of each parameter is not built yet; use 0",
        ),
        (
            {"data_stages__0__data__dataset": {"hf_dataset_or_datasets": "x", "sft_dataloader": True}},
            f"{STAGE}.data.dataset: SFTDatasetsArgs: reading this kind of dataset is not built yet; use "
            "PretrainDatasetsArgs or TextFileDatasetArgs or null",
        ),
        (
            {"checkpoints__resume_checkpoint_path": "s3:/b/x"},
            "checkpoints.resume_checkpoint_path: 's3:/b/x' is no address in an object store; write s3://bucket/prefix",
        ),
        (
            {"checkpoints__checkpoints_path": "s3://"},
            "checkpoints.checkpoints_path: 's3://' names no bucket; write s3://bucket/prefix",
        ),
        (
            {"checkpoints__checkpoints_path": "s3://key:word@bucket/x"},
            "checkpoints.checkpoints_path: it holds credentials or options, which come from the environment alone; "
            "write s3://bucket/prefix",
        ),
        (
            {"checkpoints__checkpoints_path": "s3://bucket/a/../b"},
            "checkpoints.checkpoints_path: 's3://bucket/a/../b': its prefix has an empty part, a dot or a character "
            "that has other uses; write s3://bucket/prefix",
        ),
        (
            {"checkpoints__staging_path": "here"},
            "checkpoints.staging_path: checkpoints.checkpoints_path is a local folder itself; leave out one",
        ),
        (
            {"s3_upload": {"upload_s3_path": "/local", "remove_after_upload": True}},
            "s3_upload.upload_s3_path: '/local' is no address in an object store; write s3://bucket/prefix",
        ),
        (
            {
                "checkpoints__checkpoints_path": "s3://bucket",
                "s3_upload": {"upload_s3_path": "s3://other", "remove_after_upload": True},
            },
            "s3_upload: checkpoints.checkpoints_path is 's3://bucket', where all goes already; leave out one",
        ),
        (
            {"model__model_config__hidden_size": 18},
            f"{SHAPE}.num_attention_heads: 4 does not divide {SHAPE}.hidden_size=18",
        ),
        (
            {"model__model_config__num_key_value_heads": 3},
            f"{SHAPE}.num_key_value_heads: 3 does not divide {SHAPE}.num_attention_heads=4",
        ),
        (
            {"model__model_config__hidden_size": 12},
            f"{SHAPE}.num_attention_heads: hidden_size=12 / 4 heads = 3; rotary positions need an even number",
        ),
        (
            {"model__model_config": GPT2 | {"n_embd": 18}},
            f"{SHAPE}.n_head: 4 does not divide {SHAPE}.n_embd=18",
        ),
        (
            {"model__model_config__rope_scaling": {"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4}},
            f"{SHAPE}.rope_scaling.low_freq_factor: 4 is not below {SHAPE}.rope_scaling.high_freq_factor=4",
        ),
        (
            {"model__model_config": GPT2, "tokens__sequence_length": 33},
            f"tokens.sequence_length: 33 is more than {SHAPE}.n_positions=32, and GPT-2 learns each position; "
            "raise n_positions",
        ),
        (
            {"model__model_config": GPT2, "data_stages__0__sequence_length": 64},
            f"{STAGE}.sequence_length: 64 is more than {SHAPE}.n_positions=32, and GPT-2 learns each position; "
            "raise n_positions",
        ),
        (
            {"data_stages__0__start_training_step": 2},
            f"{STAGE}.start_training_step: 2 is the first; one stage must start at step 1",
        ),
        ({"data_stages": []}, "data_stages: empty; must have at least 1"),
        (
            {"model__model_config__vocab_size": -1, "data_stages__0__data__dataset": None},
            f"{SHAPE}.vocab_size: -1 means the data's, and {STAGE} is dummy data; give a number",
        ),
        (
            {"model__model_config__vocab_size": 0},
            f"{SHAPE}.vocab_size: 0; give the number of tokens, or -1 to take it ",
        ),
        (
            {"data_stages__0__data__dataset__tokenization": "byte"},
            f"{SHAPE}.vocab_size: 64 is less than the 256 bytes of {STAGE}.data.dataset; use 256 or more",
        ),
        (
            {"data_stages__0__data__dataset": HF_TEXT},
            f"tokenizer.tokenizer_name_or_path: null, but {STAGE}.data.dataset is text that needs one; name",
        ),
        (
            {"data_stages__0__data__dataset": None, "data_stages__0__data__validation_fraction": 0.1},
            f"{STAGE}.data.validation_fraction: 0.1 of dummy data; use 0, or name a dataset",
        ),
        (
            {"tokens__val_check_interval": 5},
            "tokens.val_check_interval: 5, but no data is held out; set data_stages.0.data.validation_fraction=0.1",
        ),
        (
            {f"{SCHEDULE}.lr_decay_starting_step": 1, f"{SCHEDULE}.lr_warmup_steps": 3},
            f"{SCHEDULE}.lr_decay_starting_step: 1 is before the end of the warm-up, {SCHEDULE}.lr_warmup_steps=3",
        ),
        (
            {f"{SCHEDULE}.min_decay_lr": 0.5},
            f"{SCHEDULE}.min_decay_lr: 0.5 is above {SCHEDULE}.learning_rate=0.001",
        ),
        (
            {"optimizer__weight_decay_exclude_named_params": ["ok", "a("]},
            "optimizer.weight_decay_exclude_named_params.1: 'a(' is no regular expression: missing ), unterminated ",
        ),
        (
            {"data_stages__0__data__validation_fraction": 1.0},
            f"{STAGE}.data.validation_fraction: 1.0; must be less than 1",
        ),
        ({"model__dtype": "float16"}, "model.dtype: 'float16'; must be float32 or float64 or bfloat16; did you mean "),
        ({"tokens__micro_batch_size": True}, "tokens.micro_batch_size: true is not a whole number"),
    ],
)
def test_a_broken_rule_is_one_line_that_says_what_to_do(changes: dict[str, Any], problem: str) -> None:
    (line,) = found(**changes)
    assert line.startswith(problem)


HEADS = {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 48, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("tp", "shape", "problem"),
    [
        (3, LLAMA, f"3 does not divide {SHAPE}.num_attention_heads=4; use 1, 2 or 4"),
        (8, LLAMA, f"8 does not divide {SHAPE}.num_attention_heads=4; use 1, 2 or 4"),
        (3, GPT2, f"3 does not divide {SHAPE}.n_head=4; use 1, 2 or 4"),
        (
            4,
            LLAMA | HEADS,
            f"4 neither divides {SHAPE}.num_key_value_heads=6 nor is a multiple of it; use 1, 2, 3, 6 or 12",
        ),
        (
            4,
            LLAMA | {"intermediate_size": 34},
            f"4 does not divide the 34 features inside the MLP of {SHAPE}; use 1 or 2",
        ),
        (2, GPT2 | {"n_inner": 33}, f"2 does not divide the 33 features inside the MLP of {SHAPE}; use 1"),
    ],
)
def test_tensor_parallel_ranks_get_equal_parts(tp: int, shape: dict[str, Any], problem: str) -> None:
    assert found(parallelism__tp=tp, model__model_config=shape) == [f"parallelism.tp: {problem}"]


def test_fewer_key_value_heads_than_tensor_parallel_ranks_are_copied() -> None:
    for tp, heads in ((1, 2), (2, 2), (4, 2), (4, 1), (2, 4)):
        config_from_dict(data(parallelism__tp=tp, model__model_config__num_key_value_heads=heads))


def test_sequence_parallelism_cuts_each_micro_batch_evenly() -> None:
    layout = {"parallelism__tp": 4, "tokens__micro_batch_size": 2, "tokens__sequence_length": 6}
    stages = [data()["data_stages"][0] | {"sequence_length": 9}]
    assert found(**layout, parallelism__tp_mode="REDUCE_SCATTER", data_stages=stages) == [
        "data_stages.0.sequence_length: 9 x tokens.micro_batch_size=2 tokens is not a multiple of parallelism.tp=4, "
        "which tp_mode REDUCE_SCATTER needs; use ALL_REDUCE, or other numbers"
    ]
    config_from_dict(data(**layout, parallelism__tp_mode="REDUCE_SCATTER"))
    config_from_dict(data(**layout, parallelism__tp_mode="ALL_REDUCE", data_stages=stages))


PER_RANK = "parallelism.pp_stages_per_rank"
ACCUMULATION = "tokens.batch_accumulation_per_replica"


@pytest.mark.parametrize(
    ("engine", "pp", "per_rank", "micro_batches", "problem"),
    [
        ("1f1b", 2, 2, 4, f"{PER_RANK}: 2, but pp_engine 1f1b has one stage on each rank; use interleaved or afab"),
        ("interleaved", 2, 1, 4, f"{PER_RANK}: 1, but pp_engine interleaved needs more; use 2, or 1f1b"),
        ("1f1b", 12, None, 4, f"parallelism.pp: 12 stages is more than the 9 layers of {SHAPE}; use pp=9 or less"),
        (
            "interleaved",
            6,
            None,
            6,
            f"parallelism.pp: 6 x 2 stages a rank is more than the 9 layers of {SHAPE}; use pp=4 or less",
        ),
        ("afab", 2, 8, 4, f"parallelism.pp: 2 x 8 stages a rank is more than the 9 layers of {SHAPE}; use pp=1"),
        (
            "interleaved",
            4,
            None,
            6,
            f"{ACCUMULATION}: 6 micro-batches is not a multiple of parallelism.pp=4, which pp_engine interleaved "
            "needs; use 4 or 8",
        ),
        (
            "Interleaved",
            4,
            2,
            3,
            f"{ACCUMULATION}: 3 micro-batches is not a multiple of parallelism.pp=4, which pp_engine interleaved "
            "needs; use 4",
        ),
    ],
)
def test_a_pipeline_needs_stages_and_micro_batches_that_fit(
    engine: str, pp: int, per_rank: int | None, micro_batches: int, problem: str
) -> None:
    layout = {"pp": pp, "dp": 1, "tp": 1, "pp_engine": engine, "pp_stages_per_rank": per_rank}
    layers = {"model__model_config__num_hidden_layers": 9}
    assert found(parallelism=layout, tokens__batch_accumulation_per_replica=micro_batches, **layers) == [problem]
    config_from_dict(data(parallelism=layout | {"pp": 1}, **layers))  # there is no pipeline then


@pytest.mark.parametrize(
    ("engine", "per_rank", "stages"),
    [("afab", None, 1), ("1f1b", None, 1), ("interleaved", None, 2), ("interleaved", 3, 3), ("afab", 2, 2)],
)
def test_stages_a_rank_are_two_for_interleaved_and_else_one(engine: str, per_rank: int | None, stages: int) -> None:
    layout = {"pp": 3, "dp": 1, "tp": 1, "pp_engine": engine, "pp_stages_per_rank": per_rank}
    config = config_from_dict(data(parallelism=layout, model__model_config__num_hidden_layers=9))
    assert config.parallelism.stages_per_rank == stages
    assert warnings(config) == []


@pytest.mark.parametrize("recompute", [True, False, "selective"])
def test_what_is_recomputed_is_all_nothing_or_what_is_cheap(recompute: bool | str) -> None:
    config = config_from_dict(data(parallelism__recompute_layer=recompute))
    assert config.parallelism.recompute_layer == recompute


def test_zero_1_needs_no_replicas() -> None:
    assert warnings(config_from_dict(data(optimizer__zero_stage=1))) == []


def test_stages_do_not_collide_and_all_are_read() -> None:
    stage = data()["data_stages"][0]
    others = [stage | {"start_training_step": 1}, stage | {"name": "b", "start_training_step": 11}]
    assert found(data_stages=[stage, *others]) == [
        f"data_stages.1.name: 'a' is also the name of {STAGE}",
        f"data_stages.1.start_training_step: 1 is also the first step of {STAGE}; one stage at a time",
        "data_stages.2.start_training_step: 11 is after tokens.train_steps=10; it would never be read",
    ]


def test_the_processes_there_are_must_be_those_asked_for() -> None:
    config = config_from_dict(data())
    assert problems(config) == []
    assert problems(config, world_size=1) == []
    assert problems(config, world_size=8) == [
        "parallelism: pp=1 x dp=1 x cp=1 x tp=1 = 1 ranks, but WORLD_SIZE is 8; start as many"
    ]


def test_what_is_allowed_may_still_be_doubtful() -> None:
    assert warnings(config_from_dict(data())) == []
    doubtful = data(
        tokens__sequence_length=64,
        optimizer__learning_rate_scheduler__lr_warmup_steps=10,
        checkpoints__checkpoint_interval=11,
        checkpoints__save_final_state=False,
    )
    assert warnings(config_from_dict(doubtful)) == [
        f"tokens.sequence_length: 64 is more than {SHAPE}.max_position_embeddings=32",
        f"{SCHEDULE}.lr_warmup_steps: 10 of tokens.train_steps=10; the run ends before the warm-up does",
        "checkpoints.checkpoint_interval: longer than tokens.train_steps=10; nothing will be saved",
    ]


def test_a_rule_judges_what_is_right_beside_what_is_wrong() -> None:
    assert found(tokens__train_steps="ten", model__model_config__num_key_value_heads=3, parallelism__dp="x") == [
        f"{SHAPE}.num_key_value_heads: 3 does not divide {SHAPE}.num_attention_heads=4",
        "parallelism.dp: 'x' is not a whole number",
        "tokens.train_steps: 'ten' is not a whole number",
    ]


def test_a_list_with_something_wrong_in_it_is_not_judged() -> None:
    where = "optimizer.weight_decay_exclude_named_params"
    assert found(optimizer__weight_decay_exclude_named_params=["a(", 3]) == [f"{where}.1: 3 is not text"]


def test_nothing_can_be_asked_of_what_is_wrong() -> None:
    absent: Any = Absent()
    for question in (
        lambda: absent.width,
        lambda: absent > 1,
        lambda: 1 % absent,
        lambda: absent == 1,
        lambda: bool(absent),
        lambda: f"{absent}",
        lambda: list(absent),
    ):
        with pytest.raises(Unknown):
            question()


def test_every_line_of_not_built_names_a_path_that_exists() -> None:
    assert {path.replace("*", "0") for path in NOT_BUILT} <= set(field_paths())


def test_the_meaning_of_a_config_is_its_arithmetic() -> None:
    text = "\n".join(meaning(config_from_dict(data())))
    shape = config_from_dict(data()).model.model_config
    for fact in (
        f"{shape.parameter_count():,}",
        "6 sequences",
        "48 tokens",
        "10 steps, 480 tokens",
        "a: steps 1 to 10",
    ):
        assert fact in text
    assert "32 for each token" in "\n".join(meaning(config_from_dict(data(model__model_config__vocab_size=-1))))
