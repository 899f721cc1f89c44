"""Config -> Run: everything that a step touches, built once."""

import math
from dataclasses import dataclass, replace

import torch

from pentode import device as devices
from pentode import log
from pentode.config.kinds.init import RandomInit
from pentode.config.schema import Config
from pentode.dist.launch import World
from pentode.dist.mesh import Mesh
from pentode.errors import ConfigError
from pentode.models.registry import model_for
from pentode.nn.causal_lm import CausalLM, Part
from pentode.nn.init import initialise
from pentode.optim.groups import weight_decay_groups
from pentode.optim.master import MasterWeights
from pentode.optim.registry import Optimizer, build_optimizer
from pentode.parallel.pipeline.schedules import Action, one_stage
from pentode.parallel.spec import specs_of
from pentode.run.compiled import compile_blocks
from pentode.run.feed import Feed

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
MIB = 2**20


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
    stages: dict[int, CausalLM]
    program: list[Action]
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
    p = config.parallelism
    mesh = Mesh.build(pp=p.pp, dp=p.dp, cp=p.context_parallel_size, tp=p.tp) if world.size > 1 else Mesh.single()
    feed = Feed(config, mesh, device)
    config = _with_vocabulary(config, feed, first_step)
    log.info("Building model..")
    log.info("Setting PP block ranks...")
    model = build_model(config, mesh, device)
    _log_size(model, config, device)
    return assemble(config, world, mesh, device, feed, model)


def assemble(config: Config, world: World, mesh: Mesh, device: torch.device, feed: Feed, model: CausalLM) -> Run:
    """A Run around a model, whose values the master weights take over."""
    parameters = dict(model.named_parameters())
    groups = weight_decay_groups(
        parameters,
        weight_decay=config.optimizer.weight_decay,
        exclude=config.optimizer.weight_decay_exclude_named_params,
    )
    dtype = DTYPES[config.model.dtype]
    master = MasterWeights(
        parameters,
        groups=groups,
        data=mesh.data,
        bucket_bytes=config.model.ddp_bucket_cap_mb * MIB,
        accumulate_in=torch.promote_types(dtype, torch.float32) if config.optimizer.accumulate_grad_in_fp32 else dtype,
    )
    optimizer = build_optimizer(config.optimizer.optimizer_factory, master.flat)
    if compile_blocks([model], mode=config.model.compile, device=device):
        log.info("Compiling each kind of block once; the first step takes longer")
    program = one_stage(config.tokens.batch_accumulation_per_replica)
    healthy = torch.ones((), dtype=torch.bool, device=device)
    return Run(config, world, mesh, device, feed, {0: model}, program, master, optimizer, healthy)


def build_model(config: Config, mesh: Mesh, device: torch.device) -> CausalLM:
    """The model that the config describes, its weights not yet filled."""
    shape = config.model.model_config
    padded = padded_vocabulary(shape.vocab_size, config.model.make_vocab_size_divisible_by * mesh.tp.size)
    if padded != shape.vocab_size:
        added = padded - shape.vocab_size
        log.info(
            f"[Vocab Size Padding] Padded vocab (size: {shape.vocab_size}) with {added} dummy tokens "
            f"(new size: {padded})"
        )
    model = model_for(shape).build(
        shape,
        mesh,
        Part(range(shape.num_layers), first=True, last=True),
        device=device,
        dtype=DTYPES[config.model.dtype],
        vocab_size_padded=padded,
        seed=config.general.seed,
    )
    return model.train()


def initialise_weights(run: Run) -> None:
    """Fill the master weights with the config's random numbers, the same in every layout, and publish them."""
    log.info("Parametrizing model parameters using StandardParametrizator")
    _fill(run.master.weights, run.config, run.stages[0])
    run.master.publish()


def initial_weights(config: Config, model: CausalLM) -> dict[str, torch.Tensor]:
    """The weights that a run of this config begins with, by name, in at least float32."""
    wide = torch.promote_types(DTYPES[config.model.dtype], torch.float32)
    weights = {name: torch.empty_like(parameter, dtype=wide) for name, parameter in model.named_parameters()}
    _fill(weights, config, model)
    return weights


def _fill(weights: dict[str, torch.Tensor], config: Config, model: CausalLM) -> None:
    method = config.model.init_method
    if not isinstance(method, RandomInit):
        raise ConfigError([f"model.init_method: {type(method).__name__} is not built yet; use std"])
    layers = config.model.model_config.num_layers
    residual = method.std / math.sqrt(2 * layers) if method.scaling_method == "NUM_LAYERS" else method.std
    initialise(weights, specs_of(model), std=method.std, residual_std=residual, seed=config.general.seed)


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


def _log_size(model: CausalLM, config: Config, device: torch.device) -> None:
    item = DTYPES[config.model.dtype].itemsize
    total = config.model.model_config.parameter_count()
    local = sum(parameter.numel() for parameter in model.parameters())
    log.info(f"Total number of parameters: {log.human(total)} ({total * item / MIB:.2f}MiB)")
    log.info(f"Local number of parameters: {log.human(local)} ({local * item / MIB:.2f}MiB)")
    memory = devices.memory(device)
    log.info(
        f"[After model building] Memory usage: {memory.allocated / MIB:.2f}MiB. "
        f"Peak allocated: {memory.peak_allocated / MIB:.2f}MiB Peak reserved: {memory.peak_reserved / MIB:.2f}MiB"
    )
