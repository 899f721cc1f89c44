"""Trains a tiny model in any layout, and says what must not depend on it: losses, gradients, norms, weights.

A `Case` is a layout of a `Problem`. `train_case` runs it on this rank of a world of the case's size, on a global batch
that only the problem decides; `Outcome`s of equal problems must be equal.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pentode.config.load import config_from_dict
from pentode.config.schema import Config
from pentode.dist import collectives
from pentode.dist.launch import World
from pentode.dist.mesh import Mesh
from pentode.parallel.batch import Batch, batch_of
from pentode.parallel.spec import specs_of
from pentode.run import build
from pentode.run.build import Run
from pentode.train.evaluate import validation_loss
from pentode.train.step import train_step
from tests.helpers.config import small

STEPS = 5
SEQUENCE = 8
VOCABULARY = 37
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": SEQUENCE,
    },
    "gpt2": {
        "type": "gpt2",
        "n_embd": 16,
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
class Problem:
    """What is trained, whatever the layout: model, global batch of `samples` a step, the optimizer's options."""

    model: str = "llama"
    shape: tuple[tuple[str, Any], ...] = ()
    samples: int = 8
    masked: bool = False
    z_loss: bool = False
    clip_grad: float | None = 1.0
    optimizer: str = "adamW"
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A layout for a problem; `micro_batches` a step on each replica.

    Without `validate` there is no validation loss: where blocks are compiled, it needs a graph of its own.
    """

    problem: Problem = field(default_factory=Problem)
    dp: int = 1
    tp: int = 1
    pp: int = 1
    engine: str = "afab"
    stages_per_rank: int | None = None
    micro_batches: int = 1
    sequence_parallel: bool = False
    overlap: bool = False
    gather_again: bool = True
    zero: int = 0
    recompute: bool | str = False
    compiled: str | None = None
    small_buckets: bool = False
    pad_vocabulary: int = 1
    sanity: bool = False
    validate: bool = True

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def name(self) -> str:
        """For pytest: what differs from the plainest case."""
        changes = [
            f"{key}={getattr(mine, key)}"
            for mine, plain in ((self, Case()), (self.problem, Problem()))
            for key in mine.__dataclass_fields__
            if key != "problem" and getattr(mine, key) != getattr(plain, key)
        ]
        return " ".join(changes) or "plain"


@dataclass
class Outcome:
    """What a run of a problem gives; global tensors by name; no validation loss without labels, or if not asked for."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    validation: float | None


def config_of(case: Case) -> Config:
    """The case as a user would write it."""
    problem = case.problem
    shape = {**SHAPES[problem.model], **dict(problem.shape)}
    if problem.z_loss:
        shape |= {"z_loss_enabled": True, "z_loss_coefficient": 0.01}
    optimizer: dict[str, Any] = {
        "zero_stage": case.zero,
        "clip_grad": problem.clip_grad,
        "weight_decay_exclude_named_params": list(problem.exclude),
    }
    if problem.optimizer == "sgd":
        optimizer["optimizer_factory"] = {"name": "sgd"}
    return config_from_dict(
        small(
            general={"ignore_sanity_checks": not case.sanity, "seed": 11},
            parallelism={
                "dp": case.dp,
                "tp": case.tp,
                "pp": case.pp,
                "pp_engine": case.engine,
                "pp_stages_per_rank": case.stages_per_rank,
                "tp_mode": "REDUCE_SCATTER" if case.sequence_parallel else "ALL_REDUCE",
                "tp_linear_async_communication": case.overlap,
                "tp_recompute_allgather": case.gather_again,
                "recompute_layer": case.recompute,
            },
            model={
                "dtype": "float64",
                "model_config": shape,
                "init_method": {"std": 0.2},
                "make_vocab_size_divisible_by": case.pad_vocabulary,
                "compile": "off",
            },
            tokens={
                "sequence_length": SEQUENCE,
                "train_steps": STEPS,
                "micro_batch_size": problem.samples // case.dp // case.micro_batches,
                "batch_accumulation_per_replica": case.micro_batches,
            },
            optimizer=optimizer,
        )
    )


def train_case(case: Case) -> Outcome:
    """Train the case on this rank; every rank of the world must call, and each gets the whole outcome."""
    run, first = run_of(case), {}

    def keep_first() -> None:
        first.update({} if first else held_gradients(run))

    results = [
        train_step(run, batches_of(case, run.mesh, step), learning_rate=1e-2, before_update=keep_first)
        for step in range(STEPS)
    ]
    validation = validation_loss(run, batches_of(case, run.mesh, STEPS)) if case.validate else None
    run.master.wait_for()
    weights = {name: p.detach() for stage in run.stages.values() for name, p in stage.named_parameters()}
    losses, norms = [result.loss.item() for result in results], [result.norm.item() for result in results]
    return Outcome(losses, norms, whole_gradients(run, first), whole(run, weights), validation)


def run_of(case: Case) -> Run:
    """The case, built and initialised on this rank."""
    config = config_of(case)
    build.MIB = 1 if case.small_buckets else 2**20  # ddp_bucket_cap_mb then counts bytes: each block is a bucket
    device = torch.device("cpu")
    mesh = build.build_mesh(config)
    stages = build.build_stages(config, mesh, device)
    no_feed: Any = None  # these runs get their batches by hand
    run = build.assemble(config, World(mesh.world.rank, mesh.world.size), mesh, device, no_feed, stages)
    if case.compiled is not None:
        torch.compiler.reset()
        for stage in stages.values():
            stage.run_block = torch.compile(stage.run_block, fullgraph=True, backend=case.compiled)
    build.initialise_weights(run)
    return run


def batches_of(case: Case, mesh: Mesh, step: int) -> list[Batch]:
    """This data rank's micro-batches of a step: its part of the global batch, cut."""
    rows, mask, numbers = global_batch(case.problem, step)
    share = len(rows) // case.dp
    own = slice(mesh.data.rank * share, (mesh.data.rank + 1) * share)
    parts = zip(*(whole[own].split(share // case.micro_batches) for whole in (rows, mask, numbers)), strict=True)
    return [batch_of(r, samples=n, mask=m) for r, m, n in parts]


def global_batch(problem: Problem, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token rows, which labels count (very unevenly over samples, if masked), and the samples' numbers."""
    generator = torch.Generator().manual_seed(100 + step)
    vocabulary = dict(problem.shape).get("vocab_size", VOCABULARY)
    rows = torch.randint(vocabulary, (problem.samples, SEQUENCE + 1), generator=generator)
    mask = torch.ones(problem.samples, SEQUENCE, dtype=torch.bool)
    if problem.masked:
        lengths = torch.arange(problem.samples) % (SEQUENCE + 1)  # the first sample has no label at all
        mask = torch.arange(SEQUENCE) < lengths[:, None]
    return rows, mask, torch.arange(problem.samples) + step * problem.samples


def held_gradients(run: Run) -> dict[str, Tensor]:
    """A copy of what this rank holds of a step's gradients, before they are clipped; zero where others hold them."""
    held = {name: torch.zeros_like(gradient) for name, gradient in run.master.gradients.items()}
    for name, parts in run.master.by_name([shard.gradient for shard in run.master.shards]).items():
        for start, part in parts:
            held[name].view(-1)[start : start + part.numel()] = part
    return held


def whole_gradients(run: Run, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Global gradients of what each rank held."""
    if run.master.sharded:  # each data rank holds its shards
        held = {name: collectives.sum_(gradient, run.mesh.data) for name, gradient in held.items()}
    return whole(run, held)


def whole(run: Run, local: dict[str, Tensor], *, copies_equal: bool = True) -> dict[str, Tensor]:
    """Global tensors put together from all ranks of the model; each copy of an element must be the same."""
    specs = {name: spec for stage in run.stages.values() for name, spec in specs_of(stage).items()}
    own = [
        (name, specs[name].global_shape, [(b.global_start, b.of_local(tensor).clone()) for b in specs[name].boxes()])
        for name, tensor in local.items()
    ]
    found: dict[str, Tensor] = {}
    for name, shape, pieces in (item for items in collectives.gather_objects(own, run.mesh.model) for item in items):
        total = found.setdefault(name, torch.full(shape, torch.nan, dtype=torch.float64))
        for start, piece in pieces:
            place = total[tuple(slice(at, at + size) for at, size in zip(start, piece.shape, strict=True))]
            known = ~place.isnan()
            if copies_equal and not torch.equal(piece[known], place[known]):  # which is quick to see
                torch.testing.assert_close(
                    piece[known], place[known], msg=lambda text, n=name: f"copies of {n}: {text}"
                )
            place.copy_(piece)
    assert not any(bool(tensor.isnan().any()) for tensor in found.values())
    return dict(sorted(found.items()))


def assert_equal(got: Outcome, want: Outcome) -> None:
    """Everything of two runs of one problem, at torch's default tolerance for float64."""
    for what in ("gradients", "weights"):
        ours, theirs = getattr(got, what), getattr(want, what)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, msg=lambda text, n=name, w=what: f"{w} of {n}: {text}")
    assert (got.validation is None) == (want.validation is None)
    for what in ("losses", "norms", "validation"):
        if getattr(want, what) is None:
            continue
        ours, theirs = (torch.tensor(getattr(o, what), dtype=torch.float64) for o in (got, want))
        torch.testing.assert_close(ours, theirs, msg=lambda text, w=what: f"{w}: {text}")
