"""Rules between sections, and what is not built yet. Problems and warnings are data; nothing here raises."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

from pentode.config.check_speed import SPEED, Found, lengths
from pentode.config.kinds.gpt2 import GPT2Config
from pentode.config.kinds.init import ExistingCheckpointInit
from pentode.config.kinds.llama import LlamaConfig
from pentode.config.kinds.shape import Shape
from pentode.config.part import Absent, Unknown, part_of
from pentode.config.places import problem_of
from pentode.config.schema import Config
from pentode.config.tree import Path, Problem, Section, path_of
from pentode.config.validate import shown
from pentode.errors import ConfigError

QUOTE = "'"

# Everything the schema knows that has no code behind it: path -> (values that work, what the others would be).
# `*` stands for each stage; a section is given by its class's name. Building a thing is removing its line.
NOT_BUILT: dict[str, tuple[tuple[Any, ...], str]] = {
    "parallelism.context_parallel_size": ((1,), "context parallelism"),
    "parallelism.expert_parallel_size": ((1,), "expert parallelism"),
    "optimizer.zero_stage": ((0, 1), "sharding gradients and weights (ZeRO-2 and 3)"),
    "model.init_method": (("RandomInit", "ExistingCheckpointInit"), "this way to get the first weights"),
    "model.init_method.scaling_method": (("NUM_LAYERS", "NONE"), "this scaling"),
    "metrics_logging.log_level": ((0,), "statistics of each parameter"),
    "data_stages.*.data.dataset": (
        ("PretrainDatasetsArgs", "TextFileDatasetArgs", None),
        "reading this kind of dataset",
    ),
    "profiler": ((None,), "profiling"),
    "lighteval": ((None,), "evaluation by lighteval"),
}


def problems(config: Config, *, world_size: int | None = None) -> list[str]:
    """Every broken rule, `dotted.path: what is; what to do`; `world_size` adds the number of processes there are."""
    found = [str(problem) for problem in find(config)]
    p = config.parallelism
    if world_size is not None and world_size != config.world_size:
        sizes = f"pp={p.pp} x dp={p.dp} x cp={p.context_parallel_size} x tp={p.tp}"
        remedy = f"; start with --nproc {config.world_size}, or torchrun" if world_size == 1 else "; start as many"
        found.append(f"parallelism: {sizes} = {config.world_size} ranks, but WORLD_SIZE is {world_size}{remedy}")
    return found


def find(config: Config) -> list[Problem]:
    """Every broken rule with its path."""
    return [Problem(path_of(path), text) for rule in RULES for path, text in rule(config)]


def find_in_part(tree: Section, *, wrong: Collection[Path]) -> list[Problem]:
    """Every broken rule among the values of a tree that are right; `wrong` has the paths of the others."""
    config: Config = part_of(Config, tree, wrong=wrong)
    found: list[Problem] = []
    for rule in RULES:
        try:
            for path, text in rule(config):
                found.append(Problem(path_of(path), text))
        except Unknown:
            continue
    return found


def warnings(config: Config) -> list[str]:
    """What is allowed, but may not be what was meant."""
    return [f"{path}: {text}" for path, text in _doubts(config)]


def _not_built(c: Config) -> Found:
    for pattern, (works, what) in NOT_BUILT.items():
        for path, value in _values(c, pattern.split("."), ""):
            name = type(value).__name__ if is_dataclass(value) else value
            if name not in works:
                usable = " or ".join(shown(word).strip(QUOTE) for word in works)
                yield path, f"{shown(name).strip(QUOTE)}: {what} is not built yet; use {usable}"


def _values(node: Any, pattern: Sequence[str], path: str) -> Iterator[tuple[str, Any]]:
    """Each value that a pattern reaches, with its path; none where a section on the way is absent."""
    if isinstance(node, Absent):
        return
    if not pattern:
        yield path.removeprefix("."), node
    elif pattern[0] == "*":
        for index, item in enumerate(node):
            yield from _values(item, pattern[1:], f"{path}.{index}")
    elif hasattr(node, pattern[0]):
        yield from _values(getattr(node, pattern[0]), pattern[1:], f"{path}.{pattern[0]}")


def _heads(c: Config) -> Found:
    shape, where = c.model.model_config, "model.model_config"
    width, heads, kv = shape.WIDTH, shape.HEADS, shape.KV_HEADS
    if shape.width % shape.heads:
        yield f"{where}.{heads}", f"{shape.heads} does not divide {where}.{width}={shape.width}"
    elif isinstance(shape, LlamaConfig) and shape.head_dim % 2:
        yield (
            f"{where}.{heads}",
            f"{width}={shape.width} / {shape.heads} heads = {shape.head_dim}; rotary positions need an even number",
        )
    if shape.heads % shape.kv_heads:
        yield f"{where}.{kv}", f"{shape.kv_heads} does not divide {where}.{heads}={shape.heads}"


def _tensor_parallel(c: Config) -> Found:
    shape, where, tp = c.model.model_config, "model.model_config", c.parallelism.tp
    if shape.heads % tp:
        problem = f"does not divide {where}.{shape.HEADS}={shape.heads}"
    elif _no_even_kv(shape, tp):
        problem = f"neither divides {where}.{shape.KV_HEADS}={shape.kv_heads} nor is a multiple of it"
    elif shape.ffn_width % tp:
        problem = f"does not divide the {shape.ffn_width} features inside the MLP of {where}"
    else:
        return
    sizes = range(1, shape.heads + 1)
    fit = [n for n in sizes if not (shape.heads % n or _no_even_kv(shape, n) or shape.ffn_width % n)]
    yield "parallelism.tp", f"{tp} {problem}; use {_either(fit)}"


def _no_even_kv(shape: Shape, tp: int) -> bool:
    """Whether tp ranks can neither share the key/value heads out nor hold equally many copies of each."""
    return shape.kv_heads % tp != 0 and tp % shape.kv_heads != 0


def _sequence_parallel(c: Config) -> Found:
    tp, sequences = c.parallelism.tp, c.tokens.micro_batch_size
    if c.parallelism.tp_mode == "REDUCE_SCATTER":
        for path, length in lengths(c):
            if sequences * length % tp:
                yield (
                    path,
                    f"{length} x tokens.micro_batch_size={sequences} tokens is not a multiple of parallelism.tp={tp}, "
                    "which tp_mode REDUCE_SCATTER needs; use ALL_REDUCE, or other numbers",
                )


def _pipeline(c: Config) -> Found:
    p, layers = c.parallelism, c.model.model_config.num_layers
    if p.pp == 1:
        return
    if p.pp_engine == "1f1b" and p.stages_per_rank > 1:
        yield (
            "parallelism.pp_stages_per_rank",
            f"{p.stages_per_rank}, but pp_engine 1f1b has one stage on each rank; use interleaved or afab",
        )
    elif p.pp_engine == "interleaved" and p.stages_per_rank == 1:
        yield "parallelism.pp_stages_per_rank", "1, but pp_engine interleaved needs more; use 2, or 1f1b"
    if p.pp * p.stages_per_rank > layers:
        stages = f"{p.pp} x {p.stages_per_rank} stages a rank" if p.stages_per_rank > 1 else f"{p.pp} stages"
        most = layers // p.stages_per_rank
        yield (
            "parallelism.pp",
            f"{stages} is more than the {layers} layers of model.model_config; use "
            + (f"pp={most} or less" if most > 1 else "pp=1"),
        )


def _interleaving(c: Config) -> Found:
    pp, micro_batches = c.parallelism.pp, c.tokens.batch_accumulation_per_replica
    if c.parallelism.pp_engine == "interleaved" and micro_batches % pp:
        near = [n for n in (micro_batches // pp * pp, -(-micro_batches // pp) * pp) if n]
        yield (
            "tokens.batch_accumulation_per_replica",
            f"{micro_batches} micro-batches is not a multiple of parallelism.pp={pp}, which pp_engine interleaved "
            f"needs; use {_either(near)}",
        )


def _either(numbers: Sequence[int]) -> str:
    *some, last = map(str, numbers)
    return f"{', '.join(some)} or {last}" if some else last


def _rope(c: Config) -> Found:
    shape = c.model.model_config
    if isinstance(shape, LlamaConfig) and shape.rope_scaling is not None:
        scaling = shape.rope_scaling
        if scaling.rope_type == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
            where = "model.model_config.rope_scaling"
            yield (
                f"{where}.low_freq_factor",
                f"{scaling.low_freq_factor:g} is not below {where}.high_freq_factor={scaling.high_freq_factor:g}",
            )


def _positions(c: Config) -> Found:
    shape = c.model.model_config
    if isinstance(shape, GPT2Config):
        for path, length in lengths(c):
            if length > shape.n_positions:
                yield (
                    path,
                    f"{length} is more than model.model_config.n_positions={shape.n_positions}, and GPT-2 learns each "
                    f"position; raise n_positions",
                )


def _stages_start(c: Config) -> Found:
    starts: dict[int, int] = {}
    for i, stage in enumerate(c.data_stages):
        where = f"data_stages.{i}.start_training_step"
        start = stage.start_training_step
        if start in starts:
            yield where, f"{start} is also the first step of data_stages.{starts[start]}; one stage at a time"
        if i > 0 and start > c.tokens.train_steps:
            yield where, f"{start} is after tokens.train_steps={c.tokens.train_steps}; it would never be read"
        starts.setdefault(start, i)
    if min(starts) != 1:
        yield "data_stages.0.start_training_step", f"{min(starts)} is the first; one stage must start at step 1"


def _stages_names(c: Config) -> Found:
    names: dict[str, int] = {}
    for i, stage in enumerate(c.data_stages):
        if stage.name in names:
            yield f"data_stages.{i}.name", f"{stage.name!r} is also the name of data_stages.{names[stage.name]}"
        names.setdefault(stage.name, i)


def _datasets(c: Config) -> Found:
    vocab, vocab_size = "model.model_config.vocab_size", c.model.model_config.vocab_size
    for i, stage in enumerate(c.data_stages):
        where, dataset = f"data_stages.{i}.data.dataset", stage.data.dataset
        kind = None if dataset is None else dataset.type
        if kind is None and vocab_size == -1:
            yield vocab, f"-1 means the data's, and data_stages.{i} is dummy data; give a number"
        if dataset is None:
            if stage.data.validation_fraction:
                held_out = f"data_stages.{i}.data.validation_fraction"
                yield held_out, f"{stage.data.validation_fraction:g} of dummy data; use 0, or name a dataset"
            continue
        if dataset.type == "text_file" and dataset.tokenization == "byte" and 0 < vocab_size < 256:
            yield vocab, f"{vocab_size} is less than the 256 bytes of {where}; use 256 or more"
        if dataset.type == "hf_text" and (c.tokenizer is None or c.tokenizer.tokenizer_name_or_path is None):
            yield "tokenizer.tokenizer_name_or_path", f"null, but {where} is text that needs one; name a tokenizer"
    if vocab_size == 0:
        yield vocab, "0; give the number of tokens, or -1 to take it from the data"


def _validation(c: Config) -> Found:
    if c.tokens.val_check_interval > 0 and not any(stage.data.validation_fraction for stage in c.data_stages):
        yield (
            "tokens.val_check_interval",
            f"{c.tokens.val_check_interval}, but no data is held out; set data_stages.0.data.validation_fraction=0.1",
        )


def _schedule(c: Config) -> Found:
    s, where = c.optimizer.learning_rate_scheduler, "optimizer.learning_rate_scheduler"
    if s.lr_decay_starting_step is not None and s.lr_decay_starting_step < s.lr_warmup_steps:
        yield (
            f"{where}.lr_decay_starting_step",
            f"{s.lr_decay_starting_step} is before the end of the warm-up, {where}.lr_warmup_steps={s.lr_warmup_steps}",
        )


def _lowest_rate(c: Config) -> Found:
    s, where = c.optimizer.learning_rate_scheduler, "optimizer.learning_rate_scheduler"
    if s.min_decay_lr is not None and s.min_decay_lr > s.learning_rate:
        yield f"{where}.min_decay_lr", f"{s.min_decay_lr:g} is above {where}.learning_rate={s.learning_rate:g}"


def _patterns(c: Config) -> Found:
    for i, pattern in enumerate(c.optimizer.weight_decay_exclude_named_params):
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"optimizer.weight_decay_exclude_named_params.{i}", f"{pattern!r} is no regular expression: {error}"


def _hugging_face(c: Config) -> Found:
    if c.checkpoints.save_hf:
        shape = c.model.model_config
        try:
            (shape if shape.vocab_size > 0 else shape.with_vocab_size(1)).to_hf()
        except ConfigError as error:
            yield "checkpoints.save_hf", f"true, but {'; '.join(error.problems)}; leave it out"


def _object_stores(c: Config) -> Found:
    path, upload = c.checkpoints.checkpoints_path, c.s3_upload
    urls = {f"checkpoints.{key}": getattr(c.checkpoints, key) for key in ("checkpoints_path", "resume_checkpoint_path")}
    urls = {where: str(url) for where, url in urls.items() if str(url).lower().startswith("s3:")}
    if upload is not None:
        urls["s3_upload.upload_s3_path"] = upload.upload_s3_path
    for where, url in urls.items():
        if problem := problem_of(url):
            yield where, problem
    if isinstance(path, str) and upload is not None:
        yield "s3_upload", f"checkpoints.checkpoints_path is {shown(path)}, where all goes already; leave out one"
    if not isinstance(path, str) and c.checkpoints.staging_path is not None:
        yield "checkpoints.staging_path", "checkpoints.checkpoints_path is a local folder itself; leave out one"
    method = c.model.init_method
    if isinstance(method, ExistingCheckpointInit) and str(method.path).startswith("s3:"):
        yield (
            "model.init_method.path",
            f"{shown(str(method.path))}: weights are read from local folders; copy it to one",
        )


def _kept(c: Config) -> Found:
    if c.checkpoints.keep_last is None:
        if c.checkpoints.keep_every is not None:
            yield "checkpoints.keep_every", "has no effect without keep_last, since all are kept; leave it out"
    elif c.s3_upload is not None and c.s3_upload.remove_after_upload:
        yield "checkpoints.keep_last", "s3_upload.remove_after_upload removes all that were sent; leave out one"


RULES: tuple[Callable[[Config], Found], ...] = (
    _not_built,
    _heads,
    _tensor_parallel,
    _sequence_parallel,
    *SPEED,
    _pipeline,
    _interleaving,
    _rope,
    _positions,
    _stages_start,
    _stages_names,
    _datasets,
    _validation,
    _schedule,
    _lowest_rate,
    _patterns,
    _kept,
    _hugging_face,
    _object_stores,
)


def _doubts(c: Config) -> Found:
    shape = c.model.model_config
    if isinstance(shape, LlamaConfig):
        for path, length in lengths(c):
            if length > shape.max_positions:
                yield path, f"{length} is more than model.model_config.max_position_embeddings={shape.max_positions}"
    for key in ("step", "consumed_train_samples"):
        if getattr(c.general, key) is not None:
            yield f"general.{key}", "is written by a save and read by nobody; checkpoints know where they are"
    s, steps = c.optimizer.learning_rate_scheduler, c.tokens.train_steps
    if s.lr_warmup_steps >= steps:
        yield (
            "optimizer.learning_rate_scheduler.lr_warmup_steps",
            f"{s.lr_warmup_steps} of tokens.train_steps={steps}; the run ends before the warm-up does",
        )
    if c.checkpoints.datastates is not None and c.checkpoints.checkpointing_engine != "datastates":
        yield "checkpoints.datastates", f"has no effect with checkpointing_engine {c.checkpoints.checkpointing_engine}"
    if c.checkpoints.checkpoint_interval > steps and not c.checkpoints.save_final_state:
        yield "checkpoints.checkpoint_interval", f"longer than tokens.train_steps={steps}; nothing will be saved"
