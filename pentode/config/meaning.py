"""What a config means in numbers: batch arithmetic, parameters, tokens, operations. `pentode check` prints it."""

from collections.abc import Iterator

from pentode.config.schema import Config

UNITS = ("", "K", "M", "G", "T", "P", "E", "Z")


def meaning(config: Config) -> list[str]:
    """Lines of `name  value  (how it comes about)`."""
    return [f"{name:<22} {value}" for name, value in _facts(config)]


def _facts(c: Config) -> Iterator[tuple[str, str]]:
    shape, tokens, p = c.model.model_config, c.tokens, c.parallelism
    yield "model", f"{shape.type}: {shape.num_layers} layers, width {shape.width}, {shape.heads} heads"
    yield from _parameters(c)
    yield "processes", f"{c.world_size} = pp {p.pp} x dp {p.dp} x cp {p.context_parallel_size} x tp {p.tp}"
    yield from _layout(c)
    batch = c.global_batch_size
    product = (
        f"micro-batch {tokens.micro_batch_size} x accumulation {tokens.batch_accumulation_per_replica} x dp {p.dp}"
    )
    yield "global batch", f"{batch} sequences = {product}"
    lengths = _steps_of_length(c)
    for length in lengths:
        yield "", f"{batch * length:,} tokens, at {length} a sequence"
    run_tokens = sum(batch * length * steps for length, steps in lengths.items())
    yield "run", f"{tokens.train_steps:,} steps, {run_tokens:,} tokens"
    if shape.vocab_size > 0:
        flops = sum(batch * shape.flops_per_sequence(length) * steps for length, steps in lengths.items())
        yield "operations", f"{flops:.3g} FLOP, attention in full"
    for stage, last in zip(c.data_stages, _last_steps(c), strict=True):
        kind = "dummy data" if stage.data.dataset is None else stage.data.dataset.type
        yield "stage", f"{stage.name}: steps {stage.start_training_step} to {last}, {kind}"
    rate = c.optimizer.learning_rate_scheduler
    zero = f", ZeRO-{c.optimizer.zero_stage} over dp {p.dp}" if c.optimizer.zero_stage and p.dp > 1 else ""
    yield "optimizer", f"{c.optimizer.optimizer_factory.name}, learning rate {rate.learning_rate:g}{zero}"
    kept = "" if c.checkpoints.keep_last is None else f", the newest {c.checkpoints.keep_last} kept"
    if c.checkpoints.keep_every is not None:
        kept += f", and each of a step that {c.checkpoints.keep_every} divides"
    yield "checkpoints", f"every {c.checkpoints.checkpoint_interval:,} steps in {c.checkpoints.checkpoints_path}{kept}"


def _layout(c: Config) -> Iterator[tuple[str, str]]:
    """What a rank holds of the model, where it is not all of it."""
    shape, p = c.model.model_config, c.parallelism
    if p.tp > 1:
        heads = f"{shape.heads // p.tp} query, {max(1, shape.kv_heads // p.tp)} key/value"
        copies = f"; each key/value head on {p.tp // shape.kv_heads} ranks" if p.tp > shape.kv_heads else ""
        cut = "; tokens cut between the layers" if p.tp_mode == "REDUCE_SCATTER" else ""
        yield "tensor parallel", f"heads on a rank: {heads}{copies}{cut}"
    if p.pp > 1:
        stages, micro_batches = p.pp * p.stages_per_rank, c.tokens.batch_accumulation_per_replica
        idle = (p.pp - 1) / (p.stages_per_rank * micro_batches + p.pp - 1)  # arXiv:2104.04473, section 2.2
        yield (
            "pipeline",
            f"{stages} stages, {p.stages_per_rank} on a rank; {p.pp_engine}: idle for {idle:.0%} of a step at best",
        )


def _parameters(c: Config) -> Iterator[tuple[str, str]]:
    shape = c.model.model_config
    if shape.vocab_size < 0:
        least = shape.parameter_count(1)
        row = shape.parameter_count(2) - least
        yield "parameters", f"{least - row:,} + {row:,} for each token of the vocabulary, which the data tells"
        return
    count = shape.parameter_count()
    size = {"float64": 8, "float32": 4, "bfloat16": 2}[c.model.dtype]
    yield "parameters", f"{count:,} ({_human(count)}), {_human(count * size)}B as {c.model.dtype}"
    adam = 2 if c.optimizer.optimizer_factory.name == "adamW" else 0
    wide = max(size, 4)
    master = 0 if size >= 4 else wide
    gradient = wide if c.optimizer.accumulate_grad_in_fp32 and c.adds_gradients else size
    total = size + master + gradient + adam * wide
    yield "", f"{_human(count * total)}B with gradients, masters and optimizer: {total} bytes a parameter"
    yield "", f"{_human(count * (total - gradient))}B in a checkpoint"
    p = c.parallelism
    state = (master + adam * wide) / (p.dp if c.optimizer.zero_stage else 1)
    held = count * (size + gradient + state) / (p.pp * p.tp)
    if held < count * total:
        yield "", f"{_human(held)}B of that on each rank, if stages were equal"


def _steps_of_length(c: Config) -> dict[int, int]:
    """How many steps have sequences of each length; stages may have lengths of their own."""
    steps: dict[int, int] = {}
    for stage, last in zip(c.data_stages, _last_steps(c), strict=True):
        length = stage.sequence_length or c.tokens.sequence_length
        steps[length] = steps.get(length, 0) + last - stage.start_training_step + 1
    return steps


def _last_steps(c: Config) -> list[int]:
    """Each stage's last step."""
    starts = [stage.start_training_step for stage in c.data_stages]
    return [start - 1 for start in starts[1:]] + [c.tokens.train_steps]


def _human(count: float) -> str:
    power = 0
    while count >= 1000 and power < len(UNITS) - 1:
        count /= 1000
        power += 1
    return f"{count:.3g}{UNITS[power]}"
