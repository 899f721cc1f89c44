"""Products that add to gradient sums and end in SwiGLU give one process's numbers, in float64, in every layout."""

from dataclasses import replace

import pytest

from tests.helpers.cases import Case, Problem, assert_equal, train_case
from tests.helpers.fused import train_fused
from tests.helpers.world import WORLD

TIED, UNTIED = (Problem(shape=(("tie_word_embeddings", tied), ("num_hidden_layers", 2))) for tied in (True, False))
CASES = [
    Case(UNTIED),
    Case(TIED, micro_batches=4),
    Case(replace(UNTIED, masked=True, z_loss=True), micro_batches=2, recompute=True),
    Case(UNTIED, micro_batches=2, recompute="activation"),
    Case(TIED, dp=2, micro_batches=2),
    Case(TIED, pp=2, engine="1f1b", micro_batches=4, recompute="activation"),
    Case(UNTIED, dp=2, micro_batches=2, zero=1, small_buckets=True),
    Case(UNTIED, tp=2, micro_batches=2, sequence_parallel=True),
    Case(TIED, tp=2, micro_batches=2),
    Case(TIED, pp=2, engine="1f1b", micro_batches=4, recompute=True),
    Case(Problem(), dp=2, pp=2, engine="interleaved", stages_per_rank=2, micro_batches=4, zero=1),
    Case(TIED, dp=2, tp=2, pp=2, engine="1f1b", micro_batches=2, sequence_parallel=True, zero=1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_trains_what_one_process_trains(case: Case) -> None:
    want = train_case(Case(case.problem))
    for found in [train_fused(case)] if case.ranks == 1 else WORLD.run(train_fused, case.ranks, case=case):
        assert_equal(found, want)
