"""Overfits one batch for 20 steps on one or two GPUs, and gives the gradient norm of every kind of parameter.

Losses alone hide wrong gradients: a norm that is counted twice, or a bias that one rank forgets, changes them little.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pentode import device as devices
from pentode.config.load import config_from_dict
from pentode.config.schema import Config
from pentode.dist import collectives
from pentode.dist.launch import World
from pentode.dist.mesh import Mesh
from pentode.parallel.batch import Batch, batch_of
from pentode.run import build
from pentode.run.build import Run
from pentode.train.step import train_step, valid_tokens
from tests.helpers.cases import whole
from tests.helpers.config import small

STEPS = 20
LEARNING_RATE = 3.5e-4
# eps as large as gradients are: with a small one, Adam steps far where a gradient is all rounding, and two runs part.
ADAM = {"adam_eps": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.95, "torch_adam_is_fused": True}
# bfloat16 has 8 bits: each product is rounded by up to 2^-9, and rounding differs where sums are cut elsewhere.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
SAMPLES, SEQUENCE, VOCABULARY = 8, 64, 500
SEEN = 40  # tokens that the batch has: to learn just that is a loss of 2.5 nats less
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": SEQUENCE,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "type": "gpt2",
        "n_embd": 128,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": SEQUENCE,
        "vocab_size": VOCABULARY,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}


@dataclass(frozen=True)
class Layout:
    """What a run on one or two GPUs may differ in; `compile` is model.compile."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    engine: str = "afab"
    micro_batches: int = 4
    sequence_parallel: bool = False
    overlap: bool = False
    zero: int = 0
    recompute: bool | str = False
    compile: str = "auto"

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp


@dataclass
class Found:
    """Losses of all steps, and the gradient norm of every kind of parameter before the first and the last."""

    losses: list[float]
    first: dict[str, float]
    last: dict[str, float]


def furthest(one: Found, other: Found) -> tuple[float, str, int]:
    """How far a gradient norm is from the other's, relatively, at the most; of which kind, at which step."""
    assert one.first.keys() == other.first.keys()
    return max(
        (abs(others[kind] / norm - 1), kind, step)
        for step, ones, others in ((1, one.first, other.first), (STEPS, one.last, other.last))
        for kind, norm in ones.items()
    )


def overfit(*, model: str, layout: Layout, dtype: str) -> Found:
    """Train on this rank's GPU; every rank gets the whole result."""
    config = _config(model, layout, dtype)
    device = devices.pick("auto", local_rank=torch.distributed.get_rank())
    mesh = build.build_mesh(config)
    stages = build.build_stages(config, mesh, device)
    no_feed: Any = None  # the batch is made here
    run = build.assemble(config, World(mesh.world.rank, mesh.world.size), mesh, device, no_feed, stages)
    build.initialise_weights(run)
    batches = _batches(layout, mesh, device)
    losses, first = [], _norms(run, batches)
    last = first
    for step in range(1, STEPS + 1):
        if step == STEPS:
            last = _norms(run, batches)
        losses.append(train_step(run, batches, learning_rate=LEARNING_RATE).loss.item())
    return Found(losses, first, last)


def _config(model: str, layout: Layout, dtype: str) -> Config:
    return config_from_dict(
        small(
            general={"seed": 11},
            parallelism={
                "dp": layout.dp,
                "tp": layout.tp,
                "pp": layout.pp,
                "pp_engine": layout.engine,
                "tp_mode": "REDUCE_SCATTER" if layout.sequence_parallel else "ALL_REDUCE",
                "tp_linear_async_communication": layout.overlap,
                "recompute_layer": layout.recompute,
            },
            model={"dtype": dtype, "compile": layout.compile, "model_config": SHAPES[model]},
            tokens={
                "sequence_length": SEQUENCE,
                "micro_batch_size": SAMPLES // layout.dp // layout.micro_batches,
                "batch_accumulation_per_replica": layout.micro_batches,
            },
            optimizer={"zero_stage": layout.zero, "clip_grad": 1.0, "optimizer_factory": {**ADAM, "name": "adamW"}},
        )
    )


def _batches(layout: Layout, mesh: Mesh, device: torch.device) -> list[Batch]:
    rows = torch.randint(SEEN, (SAMPLES, SEQUENCE + 1), generator=torch.Generator().manual_seed(5))
    share = SAMPLES // layout.dp
    own = slice(mesh.data.rank * share, (mesh.data.rank + 1) * share)
    size = share // layout.micro_batches
    parts = zip(rows[own].split(size), torch.arange(SAMPLES)[own].split(size), strict=True)
    return [batch_of(r, samples=n).to(device) for r, n in parts]


def _norms(run: Run, batches: list[Batch]) -> dict[str, float]:
    """The gradient's norm of each kind of parameter, of a step that is not taken."""
    run.master.start_step(len(batches))
    tokens = valid_tokens(batches, run.mesh)
    run.pipeline.forward_backward(batches, scale=1 / tokens.to(run.loss_dtype))
    run.master.finish_gradients()
    held = {name: torch.zeros_like(gradient) for name, gradient in run.master.gradients.items()}
    for name, parts in run.master.by_name([shard.gradient for shard in run.master.shards]).items():
        for start, part in parts:
            held[name].view(-1)[start : start + part.numel()] = part
    if run.master.sharded:
        held = {name: collectives.sum_(gradient, run.mesh.data) for name, gradient in held.items()}
    squares: dict[str, Tensor] = {}
    local = {name: gradient.cpu().double() for name, gradient in held.items()}
    for name, gradient in whole(run, local, copies_equal=False).items():
        kind = re.sub(r"\.\d+\.", ".N.", name)
        squares[kind] = squares.get(kind, torch.zeros((), dtype=torch.float64)) + gradient.square().sum()
    return {kind: square.sqrt().item() for kind, square in squares.items()}
