"""With `general.ignore_sanity_checks: false`, what must hold between ranks is checked: each fault ends all of them.

A fault is done to one rank of a run that was healthy for a step; the next step must raise one and the same error on
every rank, which names the tensor and the ranks. A rank that waited for another would be found by the world's patience.
"""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pentode import log
from pentode.errors import SanityError
from pentode.parallel.batch import Batch
from pentode.run.build import Run
from pentode.train import sanity
from pentode.train.sanity import check_state
from pentode.train.state import TrainState, beside_shards
from pentode.train.step import train_step
from tests.helpers import cases
from tests.helpers.cases import Case, Problem, batches_of, run_of
from tests.helpers.source import ROOT
from tests.helpers.tiny import rows, tiny_yaml
from tests.helpers.world import WORLD

TIED = (("tie_word_embeddings", True),)
ONE_KV_HEAD = (("num_key_value_heads", 1),)
LLAMA, GPT2 = Problem(), Problem(model="gpt2")
PATCH = pytest.MonkeyPatch()

DP, TP = Case(LLAMA, dp=2, micro_batches=2), Case(LLAMA, tp=2)
ZERO, ZERO_TP = Case(LLAMA, dp=2, zero=1), Case(LLAMA, dp=2, tp=2, zero=1)
GRID = Case(LLAMA, dp=2, tp=2)
SEQUENCES = Case(LLAMA, tp=2, sequence_parallel=True)
STAGES = Case(Problem(shape=TIED), pp=2, micro_batches=2)
COPIES = Case(Problem(shape=ONE_KV_HEAD), tp=2, dp=2, zero=1)


def run_and_break(*, case: Case, fault: str, at: int | None, dtype: str) -> str:
    """Two steps on this rank, the second one broken on rank `at` or all: what it raised, else what it logged, or ""."""
    checked = cases.config_of(dataclasses.replace(case, sanity=True))
    checked = dataclasses.replace(checked, model=dataclasses.replace(checked.model, dtype=dtype))
    PATCH.setattr(cases, "config_of", lambda _: checked)
    try:
        run = run_of(case)
    finally:
        PATCH.undo()
    train_step(run, batches_of(case, run.mesh, 0), learning_rate=1e-2)
    batches = batches_of(case, run.mesh, 1)
    if at in (run.mesh.world.rank, None):
        batches = FAULTS[fault](run, batches) or batches
    logged: list[str] = []
    PATCH.setattr(log, "once", lambda message, **_: logged.append(message))
    try:
        train_step(run, batches, learning_rate=1e-2)
        check_state(
            run, TrainState(step=2, consumed_samples=7 if fault == "counts" and run.mesh.world.rank == at else 8)
        )
    except SanityError as error:
        return str(error)
    finally:
        PATCH.undo()
    return "".join(logged)


def parameter(run: Run, name: str) -> Tensor:
    return next(p.detach() for stage in run.stages.values() for n, p in stage.named_parameters() if n == name)


def change(tensor: Tensor) -> None:
    """Turn the sign of one element, the last one."""
    tensor.view(-1)[-1:].neg_()


def weight(name: str) -> Callable[[Run, list[Batch]], None]:
    """Change a weight and its master alike."""

    def fault(run: Run, batches: list[Batch]) -> None:
        run.master.wait_for()
        changed = parameter(run, name).clone()
        change(changed)
        run.master.set(name, changed)

    return fault


def beside(kind: str, name: str) -> Callable[[Run, list[Batch]], None]:
    """Change what is kept beside a weight."""

    def fault(run: Run, batches: list[Batch]) -> None:
        tensors = beside_shards(run)[kind]
        ((_, part),) = run.master.by_name(tensors)[name]
        change(part)

    return fault


def gradient(name: str, value: float) -> Callable[[Run, list[Batch]], None]:
    """Set an element of a finished gradient."""

    def fault(run: Run, batches: list[Batch]) -> None:
        finish = run.master.finish_gradients

        def and_break() -> None:
            finish()
            ((_, part),) = run.master.by_name([shard.gradient for shard in run.master.shards])[name]
            part[-1] = value

        run.master.finish_gradients = and_break  # pyright: ignore[reportAttributeAccessIssue]

    return fault


def frozen(run: Run, batches: list[Batch]) -> None:
    """Let no gradient come to a weight."""
    for stage in run.stages.values():
        stage.layers["1"].mlp_norm.weight.requires_grad_(False)


def leftover(run: Run, batches: list[Batch]) -> None:
    next(iter(run.stages.values())).norm.weight.grad = torch.zeros(16, dtype=torch.float64)


def batch(part: str) -> Callable[[Run, list[Batch]], list[Batch]]:
    """Change the last number in the last micro-batch."""

    def fault(run: Run, batches: list[Batch]) -> list[Batch]:
        odd = getattr(batches[-1], part).clone()
        odd[-1] += 1 if odd[-1] == 0 else -1
        return [*batches[:-1], dataclasses.replace(batches[-1], **{part: odd})]

    return fault


def sample(number: int) -> Callable[[Run, list[Batch]], list[Batch]]:
    """Give the last sample another number."""

    def fault(run: Run, batches: list[Batch]) -> list[Batch]:
        numbers = torch.cat((batches[-1].samples[:-1], torch.tensor([number])))
        return [*batches[:-1], dataclasses.replace(batches[-1], samples=numbers)]

    return fault


def own_first_sample(run: Run, batches: list[Batch]) -> list[Batch]:
    """Read the first sample once more, in the place of the last."""
    return sample(int(batches[0].samples[0]))(run, batches)


def first_replicas(run: Run, batches: list[Batch]) -> list[Batch]:
    """Read what the first replica reads."""
    mesh = dataclasses.replace(run.mesh, data=dataclasses.replace(run.mesh.data, rank=0))
    return batches_of(DP, mesh, 1)


def first_replicas_tokens(run: Run, batches: list[Batch]) -> list[Batch]:
    """Read those, under numbers of their own."""
    others = first_replicas(run, batches)
    return [dataclasses.replace(o, samples=b.samples) for o, b in zip(others, batches, strict=True)]


def first_replicas_first_tokens(run: Run, batches: list[Batch]) -> list[Batch]:
    """Read those of its first micro-batch alone."""
    return [*first_replicas_tokens(run, batches)[:1], *batches[1:]]


def count(run: Run, batches: list[Batch]) -> None:
    run.optimizer.updates += 1


def last_bit(run: Run, batches: list[Batch]) -> None:
    """Change a master weight so little that its weight stays."""
    ((_, part),) = run.master.by_name([shard.weight for shard in run.master.shards])["layers.2.mlp.down.weight"]
    part[-1] = torch.nextafter(part[-1], torch.zeros(()))


NORM = "layers.1.mlp_norm.weight"
FAULTS: dict[str, Callable[[Run, list[Batch]], Any]] = {
    "nothing": lambda run, batches: None,
    "weight": weight("layers.2.mlp.down.weight"),
    "norm": weight(NORM),
    "embedding": weight("embed.weight"),
    "key": weight("layers.0.attn.qkv.weight"),
    "master": beside("master", "layers.2.mlp.down.weight"),
    "moment": beside("exp_avg", "layers.2.mlp.down.weight"),
    "norm's moment": beside("exp_avg_sq", NORM),
    "nan": gradient("layers.2.mlp.down.weight", torch.nan),
    "gradient": gradient("layers.2.mlp.down.weight", 5.0),
    "norm's gradient": gradient(NORM, 5.0),
    "frozen": frozen,
    "leftover": leftover,
    "master's last bit": last_bit,
    "tokens": batch("tokens"),
    "labels": batch("labels"),
    "positions": batch("positions"),
    "sample 99": sample(99),
    "the first sample": sample(8),
    "its first sample": sample(12),
    "its own first sample": own_first_sample,
    "first replica's": first_replicas,
    "first replica's tokens": first_replicas_tokens,
    "first replica's first tokens": first_replicas_first_tokens,
    "count": count,
    "counts": lambda run, batches: None,
}


DOWN = "layers.2.mlp.down.weight"
ALIKE = "on rank 1 is not what it is on rank 0"


@pytest.mark.parametrize(
    ("case", "at", "fault", "told"),
    [
        (DP, 1, "weight", f"{DOWN} {ALIKE}"),
        (DP, 0, "weight", f"{DOWN} {ALIKE}"),
        (Case(LLAMA, dp=3), 1, "weight", f"{DOWN} on rank 1 is not what it is on ranks 0 and 2"),
        (ZERO, 1, "weight", f"{DOWN} {ALIKE}"),
        (TP, 1, "norm", f"{NORM} {ALIKE}"),
        (STAGES, 1, "embedding", f"embed.weight {ALIKE}"),
        (COPIES, 1, "key", f"layers.0.attn.qkv.weight[20:24] {ALIKE}"),
        (COPIES, 3, "norm", f"{NORM} on rank 3 is not what it is on rank 1"),
        (DP, 1, "moment", f"exp_avg of {DOWN} {ALIKE}"),
        (TP, 1, "norm's moment", f"exp_avg_sq of {NORM} {ALIKE}"),
        (ZERO_TP, 1, "norm's moment", f"exp_avg_sq of {NORM} {ALIKE}"),
        (DP, 1, "gradient", f"the gradient of {DOWN} {ALIKE}"),
        (SEQUENCES, 1, "norm's gradient", f"the gradient of {NORM} {ALIKE}"),
        (ZERO_TP, 0, "norm's gradient", f"the gradient of {NORM} {ALIKE}"),
        (DP, 1, "nan", f"the gradient of {DOWN} is not finite on rank 1 (pp rank 0, dp rank 1, tp rank 0)"),
        (ZERO, 1, "nan", f"the gradient of {DOWN} is not finite on rank 1 (pp rank 0, dp rank 1, tp rank 0)"),
        (TP, 1, "nan", f"the gradient of {DOWN} is not finite on rank 1 (pp rank 0, dp rank 0, tp rank 1)"),
        (STAGES, 1, "nan", f"the gradient of {DOWN} is not finite on rank 1 (pp rank 1, dp rank 0, tp rank 0)"),
        (STAGES, 0, "frozen", f"{NORM} got no gradient on rank 0 (pp rank 0, dp rank 0, tp rank 0); it takes no part"),
        (ZERO, 1, "frozen", f"{NORM} got no gradient on rank 1 (pp rank 0, dp rank 1, tp rank 0); it takes no part"),
        (TP, 0, "leftover", "norm.weight kept a gradient outside the gradient buffer on rank 0 (pp rank 0, dp rank 0"),
        (TP, 1, "tokens", f"tokens of micro-batch 0 {ALIKE}"),
        (TP, 1, "labels", f"labels of micro-batch 0 {ALIKE}"),
        (TP, 0, "positions", f"positions of micro-batch 0 {ALIKE}"),
        (STAGES, 1, "sample 99", f"samples of micro-batch 1 {ALIKE}"),
        (DP, 1, "first replica's", "a sample of this step came twice, to ranks 0 and 1; the data's order is broken"),
        (DP, 1, "the first sample", "a sample of this step came twice, to ranks 0 and 1; the data's order is broken"),
        (DP, 1, "its first sample", "a sample of this step came twice, to rank 1; the data's order is broken"),
        (STAGES, 1, "count", f"the count of updates {ALIKE}"),
        (STAGES, 1, "counts", "consumed_samples is 8 on rank 0, 7 on rank 1"),
        # What one line of the grid finds, the others hear of.
        (GRID, 1, "weight", f"{DOWN} on rank 3 is not what it is on rank 1"),
        (GRID, 1, "gradient", f"the gradient of {DOWN} on rank 3 is not what it is on rank 1"),
        (GRID, 3, "the first sample", "a sample of this step came twice, to ranks 1 and 3; the data's order is broken"),
        (GRID, 3, "count", "the count of updates on rank 3 is not what it is on ranks 0-2"),
        (GRID, 3, "counts", "consumed_samples is 8 on rank 0, 7 on rank 3"),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_a_fault_ends_all_ranks_with_its_place(case: Case, at: int, fault: str, told: str) -> None:
    assert ends_with(case, at, fault).startswith(f"sanity check: {told}")


def test_each_rank_tells_of_what_its_model_reads_twice() -> None:
    told = "sanity check: a sample of this step came twice, to rank 0; the data's order is broken; and 1 more like it"
    assert ends_with(TP, None, "its own first sample") == told


def test_tokens_that_come_twice_are_only_told_since_a_text_may_repeat_itself() -> None:
    told = ends_with(DP, 1, "first replica's tokens")
    assert told == "Sanity check: all tokens of this step came twice, to ranks 0 and 1: " + (
        "the text repeats itself, or the data's order is broken"
    )
    assert ends_with(DP, 1, "first replica's first tokens") == ""


@pytest.mark.parametrize("case", [TP, ZERO], ids=lambda case: case.name)
def test_a_master_that_is_not_its_weight_ends_all_ranks(case: Case) -> None:
    told = ends_with(case, 1, "master", dtype="bfloat16")
    assert told.startswith(f"sanity check: {DOWN} is not its master weight, rounded, on rank 1 (pp rank 0")


def test_masters_that_differ_by_less_than_a_weight_can_show_end_all_ranks() -> None:
    told = ends_with(DP, 1, "master's last bit", dtype="bfloat16")
    assert told == f"sanity check: master of {DOWN} {ALIKE}"


CUBE = Case(Problem(shape=(*TIED, *ONE_KV_HEAD)), dp=2, tp=2, pp=2, micro_batches=2, engine="1f1b")
PAIRS = Case(Problem(shape=(("num_key_value_heads", 2),)), tp=4)  # of ranks, each with a key/value head


@pytest.mark.parametrize("case", [CUBE, dataclasses.replace(CUBE, sequence_parallel=True, zero=1), PAIRS])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_healthy_run_passes(case: Case, dtype: str) -> None:
    assert ends_with(case, 0, "nothing", dtype=dtype) == ""


def ends_with(case: Case, at: int | None, fault: str, *, dtype: str = "float64") -> str:
    """What all ranks were told, alike."""
    first, *others = WORLD.run(run_and_break, case.ranks, case=case, fault=fault, at=at, dtype=dtype)
    assert others == [first] * len(others)
    return first


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_the_hash_knows_every_element_and_its_place(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 101).view(10, 10).to(dtype)
    others = [tensor.clone() for _ in range(100)]
    for i, other in enumerate(others):
        other.view(-1)[i] = 0 if dtype == torch.bool else -other.view(-1)[i]
    hashes = {int(sanity._hash(one)) for one in (tensor, *others, -tensor if dtype != torch.bool else ~tensor)}
    assert len(hashes) == 102
    assert int(sanity._hash(tensor.clone())) in hashes
    if dtype != torch.bool:
        assert int(sanity._hash(tensor.T)) not in hashes


def test_the_hash_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(100)
    whole = sanity._hash(tensor)
    monkeypatch.setattr(sanity, "CHUNK", 7)
    assert torch.equal(sanity._hash(tensor), whole)


@pytest.mark.long  # the launcher's part is in test_leaving and test_saving
def test_a_run_that_fails_ends_with_one_line_and_70(tmp_path: Path) -> None:
    file = tiny_yaml(tmp_path, general__ignore_sanity_checks=False, parallelism__tp=2)
    rate = "optimizer.learning_rate_scheduler.learning_rate=1e30"
    command = [sys.executable, "-m", "pentode", "train", str(file), rate, "--nproc", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 70
    place = r"rank \d \(pp rank 0, dp rank 0, tp rank \d\)"
    line = rf"pentode: sanity check: the gradient of [\w.]+ is not finite on {place}; and \d+ more like it\n"
    assert re.fullmatch(line, done.stderr)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1]
    assert not (tmp_path / "run" / "4").exists()
