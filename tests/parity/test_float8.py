"""Layers that multiply in float8 send what others do: two ranks of tp train what one process does, but for rounding."""

import dataclasses
from functools import cache

import pytest

from pentode.ops.linear import Float8
from pentode.train.step import train_step
from tests.helpers import cases
from tests.helpers.cases import STEPS, Case, Problem, batches_of, run_of
from tests.helpers.world import WORLD

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}  # 16 or a multiple, on two ranks, too
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2}
LLAMA = Problem(shape=tuple(SHAPE.items()), clip_grad=None)
RECIPES: list[Float8] = ["tensorwise", "rowwise"]
# A rank scales what it holds: numbers of 4 significant bits are rounded elsewhere, products are off by percents.
LOSS, NORM = 0.02, 0.05


def numbers(*, case: Case, float8: Float8) -> list[tuple[float, float]]:
    """The loss and the norm of each step."""
    config = cases.config_of(case)
    model = dataclasses.replace(config.model, dtype="bfloat16", float8=float8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "config_of", lambda _: dataclasses.replace(config, model=model))
        run = run_of(case)
    found = [train_step(run, batches_of(case, run.mesh, step), learning_rate=1e-3) for step in range(STEPS)]
    return [(result.loss.item(), result.norm.item()) for result in found]


@cache
def one_process(float8: Float8) -> list[tuple[float, float]]:
    return WORLD.run(numbers, 1, case=Case(LLAMA), float8=float8)[0]


@pytest.mark.parametrize("float8", RECIPES)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_of_tp_train_what_one_process_does(float8: Float8, sequence_parallel: bool) -> None:
    case = Case(LLAMA, tp=2, sequence_parallel=sequence_parallel, gather_again=False)
    for ours in WORLD.run(numbers, 2, case=case, float8=float8):
        for (loss, norm), (one_loss, one_norm) in zip(ours, one_process(float8), strict=True):
            assert loss == pytest.approx(one_loss, rel=LOSS)
            assert norm == pytest.approx(one_norm, rel=NORM)
