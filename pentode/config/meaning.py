"""What a config means, in words: parameters, batch arithmetic, tokens, stages. For `pentode check`."""

from collections.abc import Iterator

from pentode.config.check import warnings
from pentode.config.schema import Config


def meaning(config: Config) -> Iterator[str]:
    """One line for each thing that the numbers of a config amount to."""
    yield _model(config)
    tokens, p = config.tokens, config.parallelism
    batch = config.global_batch_size
    yield (
        f"step: {tokens.micro_batch_size} sequences x {tokens.batch_accumulation_per_replica} micro-batches x "
        f"dp={p.dp} = {batch:,} sequences of {tokens.sequence_length:,} tokens = {config.global_batch_size_in_tokens:,} tokens"
    )
    yield f"processes: pp={p.pp} x dp={p.dp} x cp={p.context_parallel_size} x tp={p.tp} = {config.world_size}"
    yield from _stages(config)
    if tokens.val_check_interval > 0:
        limit = f"{tokens.limit_val_batches} micro-batches" if tokens.limit_val_batches else "all that is held out"
        yield f"validation: every {tokens.val_check_interval} steps, {limit}"
    yield f"checkpoints: every {config.checkpoints.checkpoint_interval} steps, in {config.checkpoints.checkpoints_path}"
    for warning in warnings(config):
        yield f"note: {warning}"


def _model(config: Config) -> str:
    shape = config.model.model_config
    sizes = f"{shape.num_layers} layers of width {shape.width}, {shape.heads} heads"
    if shape.kv_heads != shape.heads:
        sizes += f" ({shape.kv_heads} for keys and values)"
    if shape.vocab_size == -1:
        each = shape.parameter_count(2) - shape.parameter_count(1)
        count = f"{shape.parameter_count(1) - each:,} parameters + {each:,} for each token of the data's vocabulary"
    else:
        length = config.tokens.sequence_length
        flops = shape.flops_per_sequence(length) / length
        sizes += f", vocabulary {shape.vocab_size:,}"
        count = f"{shape.parameter_count():,} parameters, {flops:.3g} FLOPs for each token"
    return f"model: {shape.type}, {sizes}: {count}, {config.model.dtype}"


def _stages(config: Config) -> Iterator[str]:
    starts = [stage.start_training_step for stage in config.data_stages] + [config.tokens.train_steps + 1]
    total = 0
    for stage, first, after in zip(config.data_stages, starts, starts[1:], strict=False):
        length = stage.sequence_length or config.tokens.sequence_length
        tokens = (after - first) * config.global_batch_size * length
        total += tokens
        dataset = "dummy data" if stage.data.dataset is None else stage.data.dataset.type
        yield f"stage {stage.name!r}: steps {first} to {after - 1}, {dataset}, {tokens:,} tokens"
    yield f"run: {config.tokens.train_steps:,} steps, {total:,} tokens"
