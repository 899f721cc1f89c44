"""The config: every section and key of the YAML, its type, default and meaning. docs/config.md is made from here.

Names and defaults are Nanotron's and Kenotron's. A null stands for the default wherever null is not a value of its own.
"""

import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from pentode.config.kinds.datasets import (
    NanosetDatasetsArgs,
    PretrainDatasetsArgs,
    SFTDatasetsArgs,
    TextFileDatasetArgs,
)
from pentode.config.kinds.gpt2 import GPT2Config
from pentode.config.kinds.init import ExistingCheckpointInit, RandomInit, SpectralMupInit
from pentode.config.kinds.llama import LlamaConfig
from pentode.config.kinds.optimizers import AdamWOptimizerArgs, SGDOptimizerArgs
from pentode.config.lighteval import LightEvalConfig
from pentode.config.places import bucket_and_prefix
from pentode.config.section import AtLeastOne, NotNegative, Probability, section


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


FilePath = Annotated[Path, Field(strict=False)]  # also from a string, when written in Python
S3Url = Annotated[str, Field(pattern="^s3://")]  # not a path, in which two slashes are one
Folds = BeforeValidator(_lower)  # Nanotron reads these words in any case
Interval = Annotated[int, Field(ge=-1)]
LogLevel = Annotated[Literal["debug", "info", "warning", "error", "critical"], Folds]

# The open unions: a new kind is one more name here.
ModelConfig = Annotated[LlamaConfig | GPT2Config, Field(discriminator="type")]
InitMethod = Annotated[RandomInit | SpectralMupInit | ExistingCheckpointInit, Field(discriminator="type")]
OptimizerFactory = Annotated[AdamWOptimizerArgs | SGDOptimizerArgs, Field(discriminator="name")]
Dataset = Annotated[
    PretrainDatasetsArgs | SFTDatasetsArgs | NanosetDatasetsArgs | TextFileDatasetArgs, Field(discriminator="type")
]


@section
class GeneralArgs:
    """What the run is called, and what holds for all of it."""

    project: str = Field(description="name of the group of runs")
    run: str = Field("%date_%jobid", description="name of the run; %date and %jobid (Slurm's, or local) are filled in")
    seed: int = Field(42, description="seed of the first weights and of dropout")
    step: NotNegative | None = Field(None, description="written by a save: the last step done")
    consumed_train_samples: NotNegative | None = Field(None, description="written by a save: sequences trained on")
    benchmark_csv_path: FilePath | None = Field(None, description="append a row about the run's speed to this CSV file")
    ignore_sanity_checks: bool = Field(True, description="false: compare the copies that processes hold alike")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU if there is one, else the CPU")
    deterministic: bool = Field(False, description="only kernels that give the same bits each time, as a CPU's do")


@section
class ParallelismArgs:
    """How many processes share what."""

    dp: AtLeastOne = Field(description="data-parallel replicas")
    pp: AtLeastOne = Field(description="pipeline-parallel ranks, each with stages of its own")
    tp: AtLeastOne = Field(description="tensor-parallel ranks")
    pp_engine: Annotated[Literal["afab", "1f1b", "interleaved"], Folds] = Field(
        "afab", description="schedule; interleaved is 1F1B over several stages a rank; no effect at pp=1"
    )
    pp_stages_per_rank: AtLeastOne | None = Field(
        None, description="stages that each pipeline rank holds; null: 2 for interleaved, else 1; no effect at pp=1"
    )
    tp_mode: Annotated[Literal["ALL_REDUCE", "REDUCE_SCATTER"], BeforeValidator(_upper)] = Field(
        "ALL_REDUCE", description="REDUCE_SCATTER: sequence parallelism between the layers; no effect at tp=1"
    )
    tp_linear_async_communication: bool = Field(
        False, description="communicate while multiplying; with ALL_REDUCE in backward alone; no effect at tp=1"
    )
    recompute_layer: Annotated[Literal[True, False, "selective", "activation"], Folds] = Field(
        False,
        description="run each block again in backward, to save memory; selective: but matmuls, attention and sums; "
        "activation: the activation of its feed-forward layer alone",
    )
    tp_recompute_allgather: bool = Field(
        True, description="with REDUCE_SCATTER, keep a rank's own tokens and gather all again in backward"
    )
    expert_parallel_size: AtLeastOne = Field(1, description="ranks that share the experts")
    context_parallel_size: AtLeastOne = Field(1, description="ranks that share each sequence")

    @property
    def stages_per_rank(self) -> int:
        """Stages that each pipeline rank holds."""
        return self.pp_stages_per_rank or (2 if self.pp_engine == "interleaved" else 1)


@section
class ModelArgs:
    """The model, its first weights, and how it is held."""

    model_config: ModelConfig = Field(description="the shape: llama or gpt2")
    init_method: InitMethod = Field(description="where the first weights come from")
    dtype: Annotated[Literal["float32", "float64", "bfloat16"], Folds] = Field(
        "bfloat16", description="type of weights and activations; the optimizer keeps bfloat16's masters in float32"
    )
    float8: Annotated[Literal["tensorwise", "rowwise"], Folds] | None = Field(
        None,
        description="multiply in float8 in the blocks (bfloat16 models, recent GPUs), with a scale a tensor or a row",
    )
    make_vocab_size_divisible_by: AtLeastOne = Field(1, description="pad the vocabulary to a multiple of this times tp")
    ddp_bucket_cap_mb: AtLeastOne = Field(
        25, description="MiB of gradients from which whole blocks are reduced together"
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="torch.compile blocks, on a CPU also loss and optimizer; auto: on a GPU those that kernels of ours "
        "do not do whole: GPT-2's, and a Llama's with tp, float8, selective recomputation or an activation budget. "
        "off: blocks, loss and optimizer without kernels of ours, too",
    )
    activation_budget: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of activations that compiled blocks keep for backward; what is cheap is computed again"
    )
    cuda_graph: Literal["auto", "on", "off"] = Field(
        "auto",
        description="replay a recorded step: one GPU alone; auto: if that is faster, and fits in half of its memory",
    )


@section
class TokenizerArgs:
    """What turns text into ids, for datasets that are text."""

    tokenizer_name_or_path: str | None = Field(None, description="a tokenizer.json, a folder with one, or a hub name")


@section
class DataStatesArgs:
    """The datastates engine: that of async, through so much memory of the host and no more."""

    host_cache_size: AtLeastOne = Field(description="GiB of host memory for each process; the next update waits for it")
    pin_host_cache: bool = Field(True, description="pin that memory: a GPU copies there at full speed")


@section
class CheckpointsArgs:
    """Where and when the run is saved, and what it starts from."""

    checkpoints_path: S3Url | FilePath = Field(
        description="the run's folder: checkpoints, metrics.jsonl, report; or s3://bucket/prefix: docs/s3.md"
    )
    checkpoint_interval: AtLeastOne = Field(description="steps between checkpoints")
    save_initial_state: bool = Field(False, description="also save before the first step")
    save_final_state: bool = Field(True, description="also save after the last step")
    save_hf: bool = Field(
        False, description="also write each checkpoint as a Hugging Face folder, hf/<step>, beside the training"
    )
    resume_checkpoint_path: S3Url | FilePath | None = Field(
        None,
        description="start an empty checkpoints_path from here: a checkpoint, or a folder of them (the newest), or s3://",
    )
    load_lr_scheduler: bool = Field(
        True, description="resume_checkpoint_path: go on at its step; false: begin at step 1"
    )
    load_optimizer: bool = Field(True, description="resume_checkpoint_path: take over its optimizer's state")
    checkpointing_engine: Annotated[Literal["async", "torch", "datastates"], Folds] = Field(
        "async", description="async: copied away, then written beside the next steps; torch: training waits"
    )
    datastates: DataStatesArgs | None = Field(
        None, description="options of checkpointing_engine datastates, which is async in bounded memory; null: 16 GiB"
    )
    on_save_error: Annotated[Literal["stop", "warn"], Folds] = Field(
        "stop", description="a disk that is full or broken: end the run, or warn and train on to the next save"
    )
    grace_s: float = Field(
        60, gt=0, description="seconds to save in when SIGTERM or SIGUSR1 ends the run; then it ends without"
    )
    keep_last: AtLeastOne | None = Field(
        None,
        description="remove all but so many of the newest checkpoints where the run lives, when a newer one was read "
        "again; null: none",
    )
    keep_every: AtLeastOne | None = Field(None, description="keep_last: never remove those of steps that this divides")
    on_corrupt: Annotated[Literal["fallback", "stop"], Folds] = Field(
        "fallback", description="a damaged newest checkpoint: go on from an older one, or end with code 66"
    )
    check_free_space: bool = Field(True, description="refuse to start where the disk has no room for the checkpoints")
    staging_path: FilePath | None = Field(
        None, description="local folder of a run whose checkpoints_path is s3://; null: s3-staging/bucket/prefix"
    )

    @property
    def folder(self) -> Path:
        """The run's local folder: checkpoints_path itself, or where one that is s3:// is staged."""
        if isinstance(self.checkpoints_path, Path):
            return self.checkpoints_path
        return self.staging_path or Path("s3-staging", *bucket_and_prefix(self.checkpoints_path))


@section
class LoggingArgs:
    """What is printed."""

    log_level: LogLevel = Field("info", description="of rank 0")
    log_level_replica: LogLevel = Field("info", description="of all other ranks")
    iteration_step_info_interval: AtLeastOne = Field(1, description="steps between iteration lines")


@section
class MetricsLoggingArgs:
    """Statistics about weights and gradients."""

    log_level: Literal[0, 1] = Field(0, description="0: the iteration line's; 1: of each parameter too")
    log_detail_interval: AtLeastOne = Field(10, description="steps between the detailed ones")


@section
class TokensArgs:
    """Lengths and counts: one step trains on micro_batch_size * batch_accumulation_per_replica * dp sequences."""

    sequence_length: AtLeastOne = Field(description="tokens of a sequence")
    train_steps: AtLeastOne = Field(description="optimizer steps in the whole run")
    micro_batch_size: AtLeastOne = Field(description="sequences that go through the model together on one replica")
    batch_accumulation_per_replica: AtLeastOne = Field(description="micro-batches in a step")
    val_check_interval: Interval = Field(
        -1, description="steps between validations, one more at the end; -1 or 0: none"
    )
    limit_val_batches: NotNegative = Field(0, description="micro-batches of one validation; 0: all that is held out")


@section
class LRSchedulerArgs:
    """Warm-up from step 1, a plateau at learning_rate, then the decay to min_decay_lr."""

    learning_rate: float = Field(gt=0, description="the highest rate")
    lr_warmup_steps: NotNegative = Field(0, description="steps of warm-up; the last of them reaches learning_rate")
    lr_warmup_style: Annotated[Literal["linear", "constant"], Folds] = Field("linear", description="its shape")
    lr_decay_style: Annotated[Literal["linear", "cosine", "1-sqrt"], Folds] = Field("linear", description="its shape")
    lr_decay_steps: NotNegative | None = Field(None, description="steps of decay; null: all that are left")
    lr_decay_starting_step: NotNegative | None = Field(
        None, description="last step before the decay; null: lr_warmup_steps"
    )
    min_decay_lr: Annotated[float, Field(ge=0)] | None = Field(
        None, description="the rate after the decay; null: learning_rate, so that there is none"
    )


@section
class OptimizerArgs:
    """How gradients change weights."""

    optimizer_factory: OptimizerFactory = Field(description="which optimizer")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        description="ZeRO (arXiv:1910.02054): 1 cuts the optimizer's state and masters over dp; 0: nothing"
    )
    weight_decay: float = Field(ge=0, description="each step takes away lr * this * weight")
    clip_grad: Annotated[float, Field(gt=0)] | None = Field(description="largest norm of all gradients; null: no limit")
    accumulate_grad_in_fp32: bool = Field(description="sum micro-batches in float32; false: in the model's type")
    learning_rate_scheduler: LRSchedulerArgs = Field(description="the rate at each step")
    weight_decay_exclude_named_params: list[str] = Field(
        default_factory=list, description="regular expressions; parameters whose name one matches are not decayed"
    )


@section
class DataArgs:
    """What a stage reads."""

    dataset: Dataset | None = Field(description="the texts; null: random tokens, to measure speed")
    seed: int = Field(42, description="seed of the order")
    num_loading_workers: NotNegative = Field(1, description="0: read in the training thread; more: ahead, in others")
    validation_fraction: Probability = Field(0.0, description="the last part of the data, never trained on")


@section
class DatasetStageArgs:
    """From a step on, read this."""

    name: str = Field(description="for the log")
    start_training_step: AtLeastOne = Field(description="first step that reads it; one stage starts at 1")
    data: DataArgs = Field(description="what is read")
    sequence_length: AtLeastOne | None = Field(None, description="null: tokens.sequence_length")


def _by_start(stages: list[DatasetStageArgs]) -> list[DatasetStageArgs]:
    return sorted(stages, key=lambda stage: stage.start_training_step)


@section
class ProfilerArgs:
    """torch.profiler on rank 0."""

    profiler_export_path: FilePath | None = Field(None, description="folder of the traces")
    wait: NotNegative = Field(1, description="steps left out of each cycle")
    warmup: NotNegative = Field(1, description="steps traced and thrown away")
    active: AtLeastOne = Field(1, description="steps kept")
    repeat: NotNegative = Field(1, description="cycles")
    skip_first: NotNegative = Field(3, description="steps before the first cycle")
    record_shapes: bool = Field(False, description="with shapes")
    profile_memory: bool = Field(False, description="with memory")
    with_stack: bool = Field(True, description="with stacks")
    export_chrome_trace: bool = Field(False, description="as a Chrome trace")


@section
class S3UploadArgs:
    """Copies of the checkpoints in an object store, as docs/s3.md describes; s5cmd itself is not needed."""

    upload_s3_path: str = Field(description="where to: s3://bucket/prefix")
    remove_after_upload: bool = Field(description="remove a local copy once the other was read back and is right")
    s5cmd_numworkers: AtLeastOne | None = Field(None, description="transfers at a time; null: 8")
    s5cmd_concurrency: AtLeastOne | None = Field(None, description="of these, parts of the same file; null: 4")


@section
class Config:
    """A run, whole. Also saved beside each checkpoint."""

    general: GeneralArgs = Field(description="name, seed, device")
    parallelism: ParallelismArgs = Field(description="layout over processes")
    model: ModelArgs = Field(description="shape and first weights")
    tokenizer: TokenizerArgs | None = Field(None, description="text to ids")
    checkpoints: CheckpointsArgs = Field(description="the run's folder")
    logging: LoggingArgs = Field(default_factory=LoggingArgs, description="what is printed")
    metrics_logging: MetricsLoggingArgs | None = Field(None, description="more statistics")
    tokens: TokensArgs = Field(description="lengths and counts")
    optimizer: OptimizerArgs = Field(description="how gradients change weights")
    data_stages: Annotated[list[DatasetStageArgs], Field(min_length=1), AfterValidator(_by_start)] = Field(
        description="what is read from which step on"
    )
    profiler: ProfilerArgs | None = Field(None, description="traces")
    lighteval: LightEvalConfig | None = Field(None, description="evaluation jobs")
    s3_upload: S3UploadArgs | None = Field(None, description="copies of checkpoints")

    @property
    def global_batch_size(self) -> int:
        """Sequences in a step."""
        return self.tokens.micro_batch_size * self.tokens.batch_accumulation_per_replica * self.parallelism.dp

    @property
    def global_batch_size_in_tokens(self) -> int:
        """Tokens in a step, at tokens.sequence_length."""
        return self.global_batch_size * self.tokens.sequence_length

    @property
    def uploads(self) -> bool:
        """Whether checkpoints go to an object store, to live there or as copies."""
        return self.s3_upload is not None or isinstance(self.checkpoints.checkpoints_path, str)

    @property
    def adds_gradients(self) -> bool:
        """Whether gradients are sums, over micro-batches or processes, for which float32 makes a difference."""
        return self.tokens.batch_accumulation_per_replica > 1 or self.world_size > 1

    @property
    def world_size(self) -> int:
        """Processes: expert parallelism is cut out of the others."""
        p = self.parallelism
        return p.dp * p.tp * p.pp * p.context_parallel_size


def expand_run_name(config: Config) -> str:
    """`general.run` with %date as now, 20240831_143722, and %jobid as Slurm's job, or local."""
    now = datetime.now().strftime("%Y%m%d_%H%M%S")
    return config.general.run.replace("%date", now).replace("%jobid", os.environ.get("SLURM_JOB_ID", "local"))
