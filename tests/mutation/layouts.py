"""The layouts that mutants are tried on: few and small, but each feature of the parallel code is in one of them.

Small worlds first: most mutants end there. One that lives is tried on all.
"""

import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pentode.generate.engine import Speaker, generate
from pentode.generate.sampling import Sampling
from pentode.optim import master
from pentode.parallel import loss
from pentode.parallel.batch import batch_of
from pentode.parallel.spec import specs_of
from pentode.run import build
from pentode.run.build import Run
from pentode.train.signals import StopSignal
from pentode.train.step import train_step
from tests.helpers.cases import (
    SEQUENCE,
    STEPS,
    Case,
    Outcome,
    Problem,
    assert_equal,
    batches_of,
    global_batch,
    run_of,
    train_case,
    whole,
)

TIED = (("tie_word_embeddings", True),)
UNTIED = (("tie_word_embeddings", False),)
SHORT = {"llama": (("num_hidden_layers", 2),), "gpt2": (("n_layer", 2),)}
DROPOUT = tuple((f"{place}_pdrop", 0.1) for place in ("embd", "resid", "attn"))
SMALL_MESSAGE = 50  # elements: key/value heads travel alone, norms and biases together
SMALL_SLICE = 5000  # bytes: of some 20 tokens' logits
PROMPT, NEW_TOKENS = 3, 3
TWO_GROUPS = (".*norm.*", r"embed\..*")

# Bounds of the norm: one that always clips, one that never does. Adam would not mind a wrong scale; SGD does.
CLIPPED = Problem(shape=TIED, masked=True, z_loss=True, clip_grad=0.1, optimizer="sgd", exclude=TWO_GROUPS)
DROPPING = Problem(model="gpt2", shape=(*DROPOUT, *TIED, *SHORT["gpt2"]), clip_grad=1e6, optimizer="sgd")
UNMASKED = Problem(model="gpt2", shape=(*UNTIED, *SHORT["gpt2"]))  # so that every rank needs every position
DROPPING_UNTIED = Problem(model="gpt2", shape=(*DROPOUT, *UNTIED), masked=True)
FEW_HEADS = Problem(shape=(("num_key_value_heads", 2), *SHORT["llama"]), clip_grad=None)
UNEVEN = Problem(shape=(*UNTIED, *SHORT["llama"]), masked=True)
ONE_LABEL = Problem(shape=SHORT["llama"], samples=2, masked=True)  # in the whole batch
UNLABELLED = Problem(shape=SHORT["llama"], samples=1, masked=True)

LAYOUTS = (
    Case(UNEVEN, tp=2, sequence_parallel=True, gather_again=False, pad_vocabulary=16),
    Case(ONE_LABEL, dp=2),
    Case(UNLABELLED, tp=2),
    Case(UNMASKED, dp=2, zero=1, small_buckets=True),
    Case(CLIPPED, dp=2, tp=2, sequence_parallel=True, zero=1, micro_batches=2),
    Case(DROPPING, tp=2, pp=2, engine="1f1b", micro_batches=4),
    Case(DROPPING, dp=2, tp=2, zero=1, overlap=True, small_buckets=True),
    Case(DROPPING_UNTIED, dp=2, pp=2, stages_per_rank=2, engine="interleaved", micro_batches=2, small_buckets=True),
    Case(FEW_HEADS, tp=4, sequence_parallel=True, overlap=True, recompute="selective"),
    Case(DROPPING_UNTIED, dp=2, tp=2, sequence_parallel=True, gather_again=False, overlap=True, micro_batches=2),
    Case(CLIPPED, pp=4, engine="1f1b", micro_batches=4),
    Case(UNEVEN, dp=2, tp=2, pp=2, engine="1f1b", overlap=True, micro_batches=2, small_buckets=True, zero=1),
    Case(CLIPPED, dp=2, tp=2, pp=2, sequence_parallel=True, zero=1, engine="interleaved", micro_batches=2),
    Case(FEW_HEADS, dp=2, tp=4, sequence_parallel=True, zero=1, small_buckets=True, recompute=True),
    Case(DROPPING, tp=2, pp=2, sequence_parallel=True, overlap=True, micro_batches=2, recompute="selective"),
)
PROBLEMS = tuple(dict.fromkeys(case.problem for case in LAYOUTS))


def write_expected(problem: Problem, path: Path) -> None:
    """Write what one process makes of a problem."""
    torch.save(found(Case(problem)), path)


def check(case: Case, path: Path, *, rank: int) -> None:
    """Train and write on this rank of the case's world, and compare with what one process made; every rank must call.

    The first rank compares, as in tests/parity/test_layouts.py. With small buckets, what is done in parts above a size
    is done in parts here.
    """
    build.initialise_weights = fill_weights
    if case.small_buckets:
        master.COALESCE, loss.SLICE_BYTES = SMALL_MESSAGE, SMALL_SLICE
    got, want = found(case), torch.load(path)
    if rank == 0:
        assert_equal(Outcome(**got["outcome"]), Outcome(**want["outcome"]))
        assert_written_alike(got["written"], want["written"])


def assert_written_alike(got: dict[str, Any], want: dict[str, Any]) -> None:
    """What `written` gives of one problem; logits where there are some."""
    for what, ours in got.items():
        if ours is not None:
            torch.testing.assert_close(ours, want[what], msg=lambda text, w=what: f"{w}: {text}")


def found(case: Case) -> dict[str, Any]:
    """What training gives, and what the first weights write."""
    outcome = train_case(case) if case.problem != UNLABELLED else train_on_nothing(case)
    return {"outcome": asdict(outcome), "written": written(case)}


@torch.no_grad()
def fill_weights(run: Run) -> None:
    """Initialise as a checkpoint is read: what belongs to the model, and no padding."""
    for stage in run.stages.values():
        specs = specs_of(stage)
        for name, values in build.initial_weights(run.config, stage):
            filled = stage.get_parameter(name).clone()
            for box in specs[name].boxes():
                box.of_local(filled).copy_(box.of_local(values))
            run.master.set(name, filled)


def train_on_nothing(case: Case) -> Outcome:
    """Steps without a label: all that they do is weight decay, and no mean of losses is to be had outside of them."""
    run = run_of(case)
    results = [train_step(run, batches_of(case, run.mesh, step), learning_rate=1e-2) for step in range(STEPS)]
    run.master.wait_for()
    weights = {name: p.detach() for stage in run.stages.values() for name, p in stage.named_parameters()}
    losses, norms = [result.loss.item() for result in results], [result.norm.item() for result in results]
    return Outcome(losses, norms, {}, whole(run, weights), validation=0.0)


@torch.no_grad()
def written(case: Case) -> dict[str, Any]:
    """The first weights' logits of the first batch, where no pipeline is in the way, and how its samples go on.

    And whether the first rank hears of a signal that reached the last, as training asks between its steps.
    """
    run = run_of(case)
    rows, mask, numbers = global_batch(case.problem, 0)
    speaker = Speaker(run.stages, run.mesh, run.pipeline.channels, run.pipeline.schedule.placement)
    logits = run.stages[0].eval().logits(None, batch_of(rows, samples=numbers, mask=mask)) if case.pp == 1 else None
    greedy = Sampling(max_new_tokens=NEW_TOKENS, temperature=0)
    tokens = generate(speaker, rows[:, :PROMPT], sampling=greedy, max_positions=SEQUENCE)
    stop = StopSignal(run.device)
    if run.mesh.world.rank == run.mesh.world.size - 1:
        stop.asked = signal.SIGTERM
    return {"logits": logits, "tokens": tokens, "stop": stop.asked_anywhere(run.mesh.world, step=0, now=True)}
