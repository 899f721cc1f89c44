"""Config -> Run: everything that a step touches, built once."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pentode import device as devices
from pentode import log
from pentode.checkpoint.proof import find_together, hear_headers
from pentode.config.kinds.init import ExistingCheckpointInit, RandomInit
from pentode.config.schema import Config
from pentode.dist.collectives import gather_objects
from pentode.dist.launch import World
from pentode.dist.mesh import Mesh
from pentode.dist.p2p import connect
from pentode.dist.together import on_first, together
from pentode.errors import ConfigError
from pentode.models.registry import model_for
from pentode.nn.causal_lm import CausalLM, Part
from pentode.nn.init import initialise
from pentode.optim.groups import weight_decay_groups
from pentode.optim.master import MasterWeights
from pentode.optim.registry import Optimizer, build_optimizer
from pentode.parallel.pipeline.partition import stage_layers
from pentode.parallel.pipeline.runner import Pipeline
from pentode.parallel.pipeline.schedules import make_schedule
from pentode.parallel.spec import specs_of
from pentode.run import compiled
from pentode.run.existing import PENTODE, Existing, kind_of, source_of, stretches, weights_for
from pentode.run.feed import Feed

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
MIB = 2**20
UNMOVED_FROM = 1 << 22  # elements: to copy the gradient of a smaller parameter costs less than to step it by itself


@dataclass
class Run:
    """A run's parts.

    config   complete: a vocabulary size taken from the data is filled in
    healthy  0-d bool on the device: whether every step so far was finite; after one that was not, none changes anything
    """

    config: Config
    world: World
    mesh: Mesh
    device: torch.device
    feed: Feed
    pipeline: Pipeline
    stages: dict[int, CausalLM]
    master: MasterWeights
    optimizer: Optimizer
    healthy: torch.Tensor

    @property
    def loss_dtype(self) -> torch.dtype:
        """What losses and their scale are computed in: float32, or float64 for a float64 model."""
        return torch.promote_types(DTYPES[self.config.model.dtype], torch.float32)


def build(config: Config, world: World, *, first_step: int) -> Run:
    """Open the data of `first_step` if the model's size hangs on it, build model, master weights and optimizer.

    Weights are freshly initialised; a checkpoint is read over them by `train.state.restore`.
    """
    device = devices.pick(config.general.device, local_rank=world.local_rank)
    if config.general.deterministic:
        devices.be_deterministic()
    mesh = build_mesh(config) if world.size > 1 else Mesh.single()
    feed = Feed(config, mesh, device)
    config = _with_vocabulary(config, feed, first_step)
    log.info("Building model..")
    log.info("Setting PP block ranks...")
    stages = build_stages(config, mesh, device)
    _log_size(stages, config, device)
    return assemble(config, world, mesh, device, feed, stages)


def build_mesh(config: Config) -> Mesh:
    """The grid of the processes that there are; every rank must call."""
    p, kv_heads = config.parallelism, config.model.model_config.kv_heads
    return Mesh.build(pp=p.pp, dp=p.dp, cp=p.context_parallel_size, tp=p.tp, kv_copies=max(1, p.tp // kv_heads))


def assemble(
    config: Config, world: World, mesh: Mesh, device: torch.device, feed: Feed, stages: dict[int, CausalLM]
) -> Run:
    """A Run around a model's stages, whose values the master weights take over."""
    p, o = config.parallelism, config.optimizer
    schedule = make_schedule(
        p.pp_engine,
        pp=mesh.pp.size,
        micro_batches=config.tokens.batch_accumulation_per_replica,
        stages_per_rank=p.stages_per_rank,
    )
    parameters = {name: parameter for stage in stages.values() for name, parameter in stage.named_parameters()}
    groups = weight_decay_groups(
        names_of_model(stages, mesh), weight_decay=o.weight_decay, exclude=o.weight_decay_exclude_named_params
    )
    dtype = DTYPES[config.model.dtype]
    wide = torch.promote_types(dtype, torch.float32) if o.accumulate_grad_in_fp32 and config.adds_gradients else dtype
    master = MasterWeights(
        parameters,
        groups=groups,
        data=mesh.data,
        bucket_bytes=config.model.ddp_bucket_cap_mb * MIB,
        accumulate_in=wide,
        zero_stage=o.zero_stage,
        unmoved_from=None if config.adds_gradients else UNMOVED_FROM,
    )
    for stage in stages.values():
        stage.before_use = master.wait_for
    if compiled.prepare_blocks(stages.values(), config, device=device):  # first: it forgets what was compiled before
        log.info("Compiling each kind of block once; the first step takes longer")
    kernels = compiled.kernels(config, device)
    optimizer = build_optimizer(o.optimizer_factory, master.shards, adamw_update=kernels.update)
    for stage in stages.values():
        stage.vocab = stage.vocab._replace(passes=kernels.loss)
    pipeline = Pipeline(stages, schedule, connect(mesh.pp, device=device))
    healthy = torch.ones((), dtype=torch.bool, device=device)
    return Run(config, world, mesh, device, feed, pipeline, stages, master, optimizer, healthy)


def build_stages(config: Config, mesh: Mesh, device: torch.device, *, training: bool = True) -> dict[int, CausalLM]:
    """The stages of the model that this rank holds, by number, their weights not yet filled.

    Those for generation (not `training`) leave sequence parallelism out, and float8: one token cannot be cut.
    """
    shape, p = config.model.model_config, config.parallelism
    padded = padded_vocabulary(shape.vocab_size, config.model.make_vocab_size_divisible_by * mesh.tp.size)
    if padded != shape.vocab_size:
        added = padded - shape.vocab_size
        log.info(
            f"[Vocab Size Padding] Padded vocab (size: {shape.vocab_size}) with {added} dummy tokens "
            f"(new size: {padded})"
        )
    options: dict[str, Any] = {}
    if training:
        options |= {"float8": config.model.float8, "activation_again": p.recompute_layer == "activation"}
    if training and mesh.tp.size > 1:
        options |= {
            "sequence_parallel": p.tp_mode == "REDUCE_SCATTER",
            "gather_again": p.tp_recompute_allgather,
            "overlap": p.tp_linear_async_communication,
        }
    count = mesh.pp.size * (p.stages_per_rank if mesh.pp.size > 1 else 1)
    layers = stage_layers(shape, stages=count, sequence_length=config.tokens.sequence_length)
    return {
        number: model_for(shape)
        .build(
            shape,
            mesh,
            Part(layers[number], first=number == 0, last=number == count - 1),
            device=device,
            dtype=DTYPES[config.model.dtype],
            vocab_size_padded=padded,
            seed=config.general.seed,
            **options,
        )
        .train(training)
        for number in range(mesh.pp.rank, count, mesh.pp.size)
    }


def names_of_model(stages: Mapping[int, CausalLM], mesh: Mesh) -> list[str]:
    """The names of all parameters of the whole model, of all pipeline ranks, in the model's order of stages."""
    own = [(number, [name for name, _ in stage.named_parameters()]) for number, stage in stages.items()]
    by_stage = sorted(pair for pairs in gather_objects(own, mesh.pp) for pair in pairs)
    return list(dict.fromkeys(name for _, names in by_stage for name in names))


def initialise_weights(run: Run) -> None:
    """Give the run its first weights, the same in every layout: random numbers, or those of a folder."""
    method = run.config.model.init_method
    path = method.path if isinstance(method, ExistingCheckpointInit) else None
    log.info(
        "Parametrizing model parameters using StandardParametrizator"
        if path is None
        else f"Loading weights from {path}"
    )
    source = None if path is None else _opened(run, path)

    def fill() -> list[str]:
        for stage in run.stages.values():
            for name, values in initial_weights(run.config, stage, source):
                run.master.set(name, values)
        return [] if source is None else stretches(run.config.model.model_config, source.shape, said_by=source.said_by)

    for line in together(fill, run.mesh.world):
        log.warning(line)


def _opened(run: Run, path: Path) -> Existing:
    """Existing weights, opened on every rank; a checkpoint's files are each proven and opened by one."""
    world = run.mesh.world
    kind = gather_objects(on_first(lambda: kind_of(path), world), world)[0]
    checkpoint = find_together(path, world) if kind == PENTODE else None
    if checkpoint is not None:
        hear_headers(checkpoint, checkpoint.groups(), world)
    return together(lambda: source_of(run.config, path, checkpoint=checkpoint), world)


def initial_weights(
    config: Config, model: CausalLM, source: Existing | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that a run of this config begins with, in at least float32, one at a time with its name.

    source  the folder that the config names, if it is open already
    """
    method = config.model.init_method
    if isinstance(method, ExistingCheckpointInit):
        yield from weights_for(model, source or source_of(config, method.path))
        return
    if not isinstance(method, RandomInit):
        raise ConfigError([f"model.init_method: {type(method).__name__} is not built yet; use std, or path"])
    layers = config.model.model_config.num_layers
    residual = method.std / math.sqrt(2 * layers) if method.scaling_method == "NUM_LAYERS" else method.std
    specs, seed = specs_of(model), config.general.seed
    for name, parameter in model.named_parameters():
        values = torch.empty_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        initialise({name: values}, specs, std=method.std, residual_std=residual, seed=seed)
        yield name, values


def padded_vocabulary(vocab_size: int, multiple: int) -> int:
    """The vocabulary's size rounded up to a multiple."""
    return -(-vocab_size // multiple) * multiple


def memory_line(device: torch.device) -> str:
    """Memory in use, in the words that Nanotron's users know. On a CPU it is the process's resident memory."""
    memory = devices.memory(device)
    return (
        f" Memory usage: {memory.allocated / MIB:.2f}MiB. Peak allocated {memory.peak_allocated / MIB:.2f}MiB. "
        f"Peak reserved: {memory.peak_reserved / MIB:.2f}MiB"
    )


def _with_vocabulary(config: Config, feed: Feed, first_step: int) -> Config:
    """The config with the vocabulary size that its data tells, where the model asks for that with -1."""
    shape = config.model.model_config
    if shape.vocab_size == -1:
        found = feed.open(first_step).vocab_size
        if found is None:
            raise ConfigError(["model.model_config.vocab_size: -1, but the data does not tell its vocabulary's size"])
        log.info(f"model.model_config.vocab_size: {found}, from the data")
        shape = shape.with_vocab_size(found)
        config = replace(config, model=replace(config.model, model_config=shape))
    feed.vocab_size = shape.vocab_size
    return config


def _log_size(stages: Mapping[int, CausalLM], config: Config, device: torch.device) -> None:
    item = DTYPES[config.model.dtype].itemsize
    total = config.model.model_config.parameter_count()
    local = sum(parameter.numel() for stage in stages.values() for parameter in stage.parameters())
    log.info(f"Total number of parameters: {log.human(total)} ({total * item / MIB:.2f}MiB)")
    log.info(f"Local number of parameters: {log.human(local)} ({local * item / MIB:.2f}MiB)")
    memory = devices.memory(device)
    log.info(
        f"[After model building] Memory usage: {memory.allocated / MIB:.2f}MiB. "
        f"Peak allocated: {memory.peak_allocated / MIB:.2f}MiB Peak reserved: {memory.peak_reserved / MIB:.2f}MiB"
    )
