"""Rules about what makes a step fast or small: float8, what is computed again, the recorded step."""

from collections.abc import Callable, Iterator

from pentode.config.schema import Config

FLOAT8_MULTIPLE = 16  # of which all sizes of a float8 product must be, as the hardware multiplies
Found = Iterator[tuple[str, str]]  # dotted path, what is wrong there


def lengths(c: Config) -> Iterator[tuple[str, int]]:
    """The sequence lengths of a run, each with its dotted path."""
    yield "tokens.sequence_length", c.tokens.sequence_length
    for i, stage in enumerate(c.data_stages):
        if stage.sequence_length is not None:
            yield f"data_stages.{i}.sequence_length", stage.sequence_length


def _float8(c: Config) -> Found:
    if c.model.float8 is None:
        return
    where, p, shape = "model.float8", c.parallelism, c.model.model_config
    if c.model.dtype != "bfloat16":
        yield where, f"{c.model.float8} with model.dtype {c.model.dtype}; use bfloat16, or leave float8 out"
    if p.tp > 1 and p.tp_linear_async_communication:
        yield where, f"{c.model.float8} with tp_linear_async_communication is not built yet; set that to false"
    if p.tp > 1 and p.tp_mode == "REDUCE_SCATTER" and p.tp_recompute_allgather:
        yield where, f"{c.model.float8} with tp_recompute_allgather is not built yet; set that to false"
    if p.recompute_layer == "activation":
        yield where, f"{c.model.float8} with recompute_layer activation is not built yet; use selective, or false"
    for name, size in (("width", shape.width), ("feed-forward width", shape.ffn_width)):
        if size % (FLOAT8_MULTIPLE * p.tp):
            yield where, f"the model's {name} of {size} is not a multiple of {FLOAT8_MULTIPLE} x tp={p.tp}"
    kv = 2 * max(shape.kv_heads // p.tp, 1) * (shape.width // shape.heads)  # beside the queries, in one product
    if kv % FLOAT8_MULTIPLE:
        yield where, f"the {kv} features of keys and values on a rank are not a multiple of {FLOAT8_MULTIPLE}"
    for path, length in lengths(c):
        if length * c.tokens.micro_batch_size % FLOAT8_MULTIPLE:
            yield (
                path,
                f"{length} x tokens.micro_batch_size={c.tokens.micro_batch_size} tokens is not a multiple of "
                f"{FLOAT8_MULTIPLE}, which model.float8 needs",
            )


def _activation_budget(c: Config) -> Found:
    where = "model.activation_budget"
    if c.model.activation_budget < 1 and c.model.compile == "off":
        yield where, "it is for compiled blocks; leave model.compile at auto or on, or use parallelism.recompute_layer"
    if c.model.activation_budget < 1 and c.parallelism.recompute_layer is not False:
        yield where, "parallelism.recompute_layer chooses what is computed again; set one of the two"


def _cuda_graph(c: Config) -> Found:
    if c.model.cuda_graph != "on":
        return
    where, instead = "model.cuda_graph", "steps of one GPU alone are replayed; use auto, or off"
    if c.world_size > 1:
        yield where, f"on, but parallelism has {c.world_size} ranks, and {instead}"
    if c.general.device == "cpu":
        yield where, f"on, but general.device is cpu, and {instead}"
    if not c.general.ignore_sanity_checks:
        yield where, "on, but general.ignore_sanity_checks is false, and a replayed step checks nothing; set it to true"


SPEED: tuple[Callable[[Config], Found], ...] = (_float8, _activation_budget, _cuda_graph)
