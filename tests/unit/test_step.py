"""The step does what a plain PyTorch loop does, counts tokens as it should, and survives bad numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pentode.dist.mesh import Mesh
from pentode.parallel.batch import IGNORE, Batch
from pentode.run import build
from pentode.run.build import Run, build_stages, initial_weights
from pentode.train.evaluate import validation_loss
from pentode.train.step import train_step, valid_tokens
from tests.helpers.masters import publish, weights
from tests.helpers.steps import step_batches, tiny_run
from tests.helpers.tiny import tiny_config

NO_DROPOUT = {f"model__model_config__{place}_pdrop": 0.0 for place in ("embd", "resid", "attn")}


def masked(batch: Batch, keep: int) -> Batch:
    """The batch with only its first `keep` labels."""
    labels = batch.labels.clone()
    labels[keep:] = IGNORE
    return replace(batch, labels=labels)


def snapshot(run: Run) -> list[torch.Tensor]:
    tensors = [shard.weight for shard in run.master.shards] + [run.optimizer.updates]
    tensors += [tensor for kind in run.optimizer.state().values() for tensor in kind]
    return [tensor.clone() for tensor in tensors]


def test_five_steps_equal_a_plain_loop(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, model__dtype="float64", **NO_DROPOUT)
    (plain,) = build_stages(run.config, Mesh.single(), run.device).values()
    for name, weight in initial_weights(run.config, plain):
        plain.get_parameter(name).data.copy_(weight)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        batches = step_batches(run, step)
        result = train_step(run, batches, learning_rate=1e-2)
        loss = sum(plain(None, batch) for batch in batches) / sum(batch.valid() for batch in batches)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        torch.testing.assert_close(result.loss, loss.detach())
        torch.testing.assert_close(result.norm, norm)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(weights(run.master)[name], parameter.detach())


def test_cutting_a_batch_into_micro_batches_changes_nothing(tmp_path: Path) -> None:
    whole = tiny_run(
        tmp_path, model__dtype="float64", tokens__micro_batch_size=8, tokens__batch_accumulation_per_replica=1
    )
    parts = tiny_run(
        tmp_path, model__dtype="float64", tokens__micro_batch_size=2, tokens__batch_accumulation_per_replica=4
    )
    for step in range(1, 5):
        one, other = (train_step(run, step_batches(run, step), learning_rate=1e-2) for run in (whole, parts))
        torch.testing.assert_close(one.loss, other.loss)
        torch.testing.assert_close(one.norm, other.norm)
    for name, weight in weights(whole.master).items():
        torch.testing.assert_close(weight, weights(parts.master)[name])


def test_the_loss_is_the_mean_over_labels_not_over_micro_batches(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, model__dtype="float64", **NO_DROPOUT)
    first, second = step_batches(run, 1)
    batches = [masked(first, 3), second]
    with torch.no_grad():
        expected = sum(run.stages[0](None, batch) for batch in batches) / (3 + second.labels.numel())
    assert valid_tokens(batches, run.mesh).item() == 3 + second.labels.numel()
    torch.testing.assert_close(train_step(run, batches, learning_rate=1e-3).loss, expected)


def test_a_batch_without_labels_changes_weights_only_by_decay(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    before = {name: weight.clone() for name, weight in weights(run.master).items()}
    result = train_step(run, [masked(batch, 0) for batch in step_batches(run, 1)], learning_rate=0.5)
    assert result.loss.item() == 0
    for name, weight in weights(run.master).items():
        torch.testing.assert_close(weight, before[name] * (1 - 0.5 * 0.1))


@pytest.mark.parametrize("name", ["adamW", "sgd"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, name: str) -> None:
    factory = {"name": "sgd"} if name == "sgd" else tiny_config(tmp_path).optimizer.optimizer_factory
    changes = {"optimizer__optimizer_factory": factory} if name == "sgd" else {}
    run = tiny_run(tmp_path, **changes)
    train_step(run, step_batches(run, 1), learning_rate=1e-2)
    good = weights(run.master)["norm.weight"].clone()
    weights(run.master)["norm.weight"][3] = torch.inf
    publish(run.master)
    before = snapshot(run)
    train_step(run, step_batches(run, 2), learning_rate=1e-2)
    assert not run.healthy
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(run), strict=True))

    weights(run.master)["norm.weight"].copy_(good)
    publish(run.master)
    train_step(run, step_batches(run, 3), learning_rate=1e-2)
    assert not run.healthy, "nothing may follow a bad step"
    assert torch.equal(weights(run.master)["norm.weight"], good)


def test_bfloat16_weights_follow_their_float32_masters(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, model__dtype="bfloat16")
    for step in range(1, 4):
        train_step(run, step_batches(run, step), learning_rate=1e-3)
    assert run.healthy
    for name, parameter in run.stages[0].named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert weights(run.master)[name].dtype == torch.float32
        assert torch.equal(parameter, weights(run.master)[name].bfloat16())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_gradients_lie_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    found = []
    for unmoved_from in (build.UNMOVED_FROM, 1):
        monkeypatch.setattr(build, "UNMOVED_FROM", unmoved_from)
        run = tiny_run(
            tmp_path, model__dtype=dtype, tokens__batch_accumulation_per_replica=1, optimizer__clip_grad=None
        )
        losses = [train_step(run, step_batches(run, step), learning_rate=1e-2).loss for step in (1, 2, 3)]
        found.append(weights(run.master) | {"losses": torch.stack(losses)})
        whole = sum(flat.layout.size for flat in run.master.flat)
        assert (sum(flat.gradient.numel() for flat in run.master.flat) == whole) == (unmoved_from > 1)
    moved, kept = found
    assert all(torch.equal(moved[name], kept[name]) for name in moved.keys() | kept.keys())


def test_validation_changes_nothing_and_has_no_dropout(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    before = snapshot(run)
    losses = {validation_loss(run, run.feed.validation(1)) for _ in range(2)}
    assert len(losses) == 1
    assert run.stages[0].training
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(run), strict=True))
    assert validation_loss(run, []) is None
    assert validation_loss(run, [masked(batch, 0) for batch in step_batches(run, 1)]) is None
