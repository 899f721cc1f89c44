"""The `lighteval` section: each checkpoint evaluated by another job, field for field as in Nanotron and Kenotron."""

from typing import Any, Literal

from pydantic import Field

from pentode.config.section import AtLeastOne, section


@section
class GenerationArgs:
    """How an evaluation samples."""

    sampler: Literal["TOP_P", "TOP_K", "GREEDY", "BASIC"] | None = Field(None, description="sampling method")
    temperature: float | None = Field(None, description="divides the logits")
    top_k: int | None = Field(None, description="keep this many likeliest tokens")
    top_p: float | None = Field(None, description="keep the likeliest tokens up to this probability")
    n_samples: int | None = Field(None, description="answers for each question")
    eos: str | None = Field(None, description="text that ends an answer")
    seed: int | None = Field(42, description="seed of sampling")
    use_cache: bool | None = Field(False, description="keep keys and values")


@section
class LightEvalTasksArgs:
    """Which tasks."""

    tasks: str | None = Field(None, description="task names, or a file of them")
    custom_tasks: str | None = Field(None, description="module with more tasks")
    max_samples: int | None = Field(None, description="samples for each task")
    num_fewshot_seeds: int | None = Field(None, description="seeds of the few-shot examples")
    dataset_loading_processes: int = Field(8, description="processes that load datasets")
    multichoice_continuations_start_space: bool | None = Field(None, description="choices start with a space")
    no_multichoice_continuations_start_space: bool | None = Field(None, description="choices do not start with a space")


@section
class LightEvalLoggingArgs:
    """Where results go."""

    local_output_path: str | None = Field(None, description="folder of results")
    push_results_to_hub: bool | None = Field(None, description="push results")
    push_details_to_hub: bool | None = Field(None, description="push details")
    push_results_to_tensorboard: bool | None = Field(None, description="push curves")
    hub_repo_results: str | None = Field(None, description="repository of results")
    hub_repo_details: str | None = Field(None, description="repository of details")
    hub_repo_tensorboard: str | None = Field(None, description="repository of curves")
    tensorboard_metric_prefix: str | None = Field(None, description="prefix of curves")


@section
class LightEvalWandbLoggerConfig:
    """Weights & Biases."""

    wandb_project: str = Field("", description="project")
    wandb_entity: str | None = Field(None, description="user or team")
    wandb_run_name: str | None = Field(None, description="run")


@section
class LightEvalSlurm:
    """The Slurm job that evaluates."""

    gpus_per_node: AtLeastOne = Field(8, description="GPUs of a node")
    partition: str = Field("hopper-prod", description="partition")
    hf_cache: str = Field("~/.cache/huggingface", description="Hugging Face's cache")
    cpus_per_task: AtLeastOne = Field(88, description="CPU cores")
    qos: str = Field("low", description="quality of service")
    time: str = Field("24:00:00", description="time limit")
    reservation: str | None = Field("smollm", description="reservation")


@section
class LightEvalConfig:
    """Evaluates checkpoints while training goes on."""

    slurm_script_dir: str | None = Field("eval_results/launch-config", description="folder of job scripts")
    slurm_template: str | None = Field(None, description="template of the job script (Kenotron)")
    checkpoints_path: str | None = Field(None, description="checkpoints to evaluate (Kenotron)")
    logs_path: str | None = Field("eval_results/logs", description="folder of job logs")
    local_checkpoint_dir: str = Field("/scratch", description="where a job copies the checkpoint")
    parallelism: dict[str, Any] | None = Field(None, description="layout of the evaluation")
    batch_size: AtLeastOne | None = Field(None, description="samples at a time")
    generation: GenerationArgs | None = Field(None, description="sampling")
    tasks: LightEvalTasksArgs = Field(default_factory=LightEvalTasksArgs, description="tasks")
    logging: LightEvalLoggingArgs | None = Field(None, description="results")
    wandb: LightEvalWandbLoggerConfig | None = Field(None, description="Weights & Biases")
    slurm: LightEvalSlurm | None = Field(None, description="the job")
    s3_save_path: str | None = Field(None, description="remote folder of results")
    upload_to_wandb: bool = Field(False, description="upload results")
    output_dir: str | None = Field(None, description="folder of outputs")
    nanotron_path: str = Field("./", description="Nanotron's checkout")
    eval_config_override: str | None = Field(None, description="another evaluation config")
    eval_interval: AtLeastOne | None = Field(None, description="steps between evaluations; null: at each checkpoint")
    eval_interval_file: str | None = Field(None, description="file with an interval, read before each save")
