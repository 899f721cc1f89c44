"""Every layout gives one process's numbers: losses, the first gradients, norms and weights of 5 steps, in float64.

A test is a case: a layout (tests/helpers/cases.py) of a problem, compared with one process that trains the same
problem in one micro-batch, at torch's default tolerances.
"""

from dataclasses import replace
from functools import cache, partial
from itertools import product

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.helpers.cases import Case, Outcome, Problem, assert_equal, config_of, train_case
from tests.helpers.config import outcome
from tests.helpers.world import WORLD

TIED = (("tie_word_embeddings", True),)
UNTIED = (("tie_word_embeddings", False),)
FEW_HEADS = (("num_key_value_heads", 2),)
PARTITIONED = "aot_eager_decomp_partition"  # traced, and cut into forward and backward, without writing kernels
DROPOUT = tuple((f"{place}_pdrop", 0.1) for place in ("embd", "resid", "attn"))

LLAMA, GPT2 = Problem(), Problem(model="gpt2")
DROPPING = Problem(model="gpt2", shape=DROPOUT)


def deep(problem: Problem, layers: int) -> Problem:
    """The same of so many layers; two are enough where no stage has more than one."""
    name = "num_hidden_layers" if problem.model == "llama" else "n_layer"
    return replace(problem, shape=(*problem.shape, (name, layers)))


def axes(problem: Problem) -> list[Case]:
    """Each axis by itself, at 2 and 4."""
    sizes, two = (2, 4), deep(problem, 2)
    data = [Case(two, dp=n, micro_batches=m, zero=z) for n in sizes for z, m in ((0, 1), (1, 2))]
    tensor = [Case(two, tp=n, sequence_parallel=cut) for n in sizes for cut in (False, True)]
    stages = [Case(problem, pp=n, engine=e, micro_batches=4) for n in sizes for e in ("afab", "1f1b")]
    several = [Case(problem, pp=2, engine=e, stages_per_rank=2, micro_batches=4) for e in ("afab", "interleaved")]
    return data + tensor + stages + several


def cubes() -> list[Case]:
    """dp2 x tp2 x pp2 in half of all the ways, so chosen that any four settings meet in every combination."""
    found = []
    ways = product((False, True), (0, 1), (False, True), (TIED, UNTIED), (2, 4), ("afab", "1f1b", "interleaved"))
    for cut, zero, recompute, shape, micro_batches, engine in ways:
        if (cut + zero + recompute + (shape is TIED) + micro_batches // 4) % 2 == 0:
            model = "gpt2" if zero == (engine == "1f1b") else "llama"
            problem = Problem(model=model, shape=shape, masked=cut != recompute)
            if engine != "interleaved":
                problem = deep(problem, 2)
            layout = {"micro_batches": micro_batches, "engine": engine, "sequence_parallel": cut, "zero": zero}
            found.append(Case(problem, dp=2, tp=2, pp=2, recompute=recompute, **layout))
    return found


def cube(problem: Problem, **changes: object) -> Case:
    """dp2 x tp2 x pp2 with everything on."""
    layout = {"dp": 2, "tp": 2, "pp": 2, "micro_batches": 2, "engine": "1f1b", "sequence_parallel": True, "zero": 1}
    return Case(problem, **{**layout, **changes})  # pyright: ignore[reportArgumentType]


NAMED = {
    "accumulation alone": [Case(LLAMA, micro_batches=4), Case(DROPPING, micro_batches=2)],
    "accumulation 1 and 4 in a cube": [
        cube(deep(LLAMA, 2), micro_batches=1, engine=engine) for engine in ("afab", "1f1b")
    ],
    "dropout": [
        Case(DROPPING, dp=2, micro_batches=2),
        Case(DROPPING, tp=2),
        Case(DROPPING, tp=4, sequence_parallel=True),
        Case(DROPPING, pp=2, engine="1f1b", micro_batches=4),
        Case(DROPPING, tp=2, sequence_parallel=True, recompute=True),
        cube(DROPPING),
        cube(DROPPING, engine="interleaved", recompute=True),
    ],
    "label masks that differ between ranks and micro-batches": [
        Case(Problem(masked=True), dp=4, micro_batches=2),
        cube(Problem(masked=True, z_loss=True)),
        Case(Problem(masked=True, z_loss=True), pp=2, engine="1f1b", micro_batches=8),
        Case(Problem(masked=True, samples=1), pp=2, tp=2),  # the only sample has no label
    ],
    "padded vocabulary": [
        Case(LLAMA, tp=4, pad_vocabulary=16),
        Case(Problem(shape=(("vocab_size", 3),)), tp=4, sequence_parallel=True),  # the last rank has padding alone
        cube(deep(Problem(shape=TIED), 2), pad_vocabulary=16),
    ],
    "fewer key/value heads than tp": [
        Case(Problem(shape=FEW_HEADS), tp=4),
        Case(Problem(shape=FEW_HEADS), tp=4, sequence_parallel=True, dp=2, zero=1),
        Case(Problem(shape=(("num_key_value_heads", 1),)), tp=4, pp=2, micro_batches=2, small_buckets=True),
        Case(Problem(shape=(("num_key_value_heads", 1),)), tp=2, dp=2, zero=1, small_buckets=True),
    ],
    "biases under sequence parallelism": [
        Case(GPT2, tp=4, sequence_parallel=True, zero=1, dp=2),
        Case(GPT2, tp=4, sequence_parallel=True, pp=2, micro_batches=2),
    ],
    "two stages on each of four ranks": [
        Case(Problem(shape=(("num_hidden_layers", 8),)), pp=4, engine="interleaved", micro_batches=4),
        Case(
            Problem(shape=(("num_hidden_layers", 8), *TIED)), pp=4, dp=2, engine="interleaved", micro_batches=4, zero=1
        ),
        Case(Problem(model="gpt2", shape=(("n_layer", 9),)), pp=4, stages_per_rank=2, micro_batches=8),
    ],
    "layers not divisible by pp": [
        Case(Problem(shape=(("num_hidden_layers", 5),)), pp=2, micro_batches=2),
        Case(Problem(model="gpt2", shape=(("n_layer", 5),)), pp=4, engine="1f1b", micro_batches=4),
        Case(
            Problem(shape=(("num_hidden_layers", 7),)), pp=2, engine="interleaved", stages_per_rank=3, micro_batches=2
        ),
    ],
    "micro-batches not a multiple of pp": [
        Case(Problem(samples=6), pp=4, engine="1f1b", micro_batches=6),
        Case(Problem(samples=6), pp=4, micro_batches=3),
        Case(Problem(samples=6), pp=4, engine="1f1b", micro_batches=2),
        cube(Problem(samples=6), micro_batches=3),
    ],
    "clipping active and inactive": [
        cube(deep(Problem(clip_grad=bound, shape=TIED), 2)) for bound in (None, 0.01, 1e6)
    ],
    "two weight-decay groups": [
        cube(Problem(exclude=(r".*norm.*", r"embed\..*"), shape=TIED)),
        Case(Problem(model="gpt2", exclude=(".*bias", ".*norm.*")), pp=4, dp=2, micro_batches=2, zero=1),
    ],
    "another optimizer": [cube(deep(Problem(optimizer="sgd"), 2))],
    "many small buckets": [
        cube(LLAMA, small_buckets=True),
        cube(Problem(model="gpt2"), small_buckets=True, engine="interleaved", zero=0),
        Case(LLAMA, dp=4, zero=1, small_buckets=True),
    ],
    "messages under products": [
        Case(LLAMA, tp=4, overlap=True),
        Case(GPT2, tp=4, sequence_parallel=True, overlap=True),
        Case(LLAMA, tp=4, sequence_parallel=True, overlap=True, gather_again=False),
        Case(Problem(shape=FEW_HEADS), tp=4, sequence_parallel=True, overlap=True, recompute="selective"),
        cube(LLAMA, overlap=True),
        cube(DROPPING, overlap=True, gather_again=False, engine="interleaved"),
    ],
    "inputs kept whole": [
        Case(LLAMA, tp=4, sequence_parallel=True, gather_again=False),
        cube(deep(GPT2, 2), gather_again=False),
    ],
    "chosen operations computed again": [
        Case(LLAMA, recompute="selective", micro_batches=2),
        Case(LLAMA, tp=4, sequence_parallel=True, recompute="selective"),
        Case(DROPPING, tp=2, recompute="selective"),
        cube(deep(LLAMA, 2), recompute="selective"),
        cube(DROPPING, recompute="selective", engine="afab", zero=0),
    ],
    "activations computed again": [
        Case(LLAMA, recompute="activation", micro_batches=2),
        Case(GPT2, tp=4, sequence_parallel=True, recompute="activation"),
        Case(LLAMA, tp=2, sequence_parallel=True, overlap=True, recompute="activation"),
        cube(deep(LLAMA, 2), recompute="activation"),
        cube(DROPPING, recompute="activation", engine="interleaved"),
    ],
    "traced and partitioned": [
        Case(LLAMA, tp=2, sequence_parallel=True, recompute="activation", compiled=PARTITIONED),
        Case(DROPPING, tp=2, overlap=True, recompute="activation", compiled=PARTITIONED),
        Case(LLAMA, tp=2, sequence_parallel=True, recompute="selective", compiled=PARTITIONED),
        Case(LLAMA, tp=2, recompute="selective", compiled=PARTITIONED),
        Case(LLAMA, tp=2, sequence_parallel=True, recompute=True, compiled=PARTITIONED),
        Case(LLAMA, tp=2, sequence_parallel=True, compiled=PARTITIONED),
        Case(LLAMA, tp=2, sequence_parallel=True, overlap=True, recompute="selective", compiled=PARTITIONED),
        Case(DROPPING, tp=2, sequence_parallel=True, overlap=True, compiled=PARTITIONED),
        Case(LLAMA, dp=2, micro_batches=2, zero=1, small_buckets=True, compiled=PARTITIONED),
        Case(LLAMA, pp=2, engine="1f1b", micro_batches=4, compiled=PARTITIONED),
        cube(GPT2, recompute="selective", compiled=PARTITIONED, validate=False),
        cube(DROPPING, recompute="selective", compiled=PARTITIONED, overlap=True, validate=False),
    ],
    "compiled": [
        Case(LLAMA, tp=2, sequence_parallel=True, recompute="selective", compiled="inductor", validate=False),
        Case(LLAMA, tp=2, sequence_parallel=True, overlap=True, compiled="inductor"),
        Case(DROPPING, tp=2, sequence_parallel=True, recompute="selective", compiled="inductor", validate=False),
    ],
    "sanity checks on": [
        cube(Problem(shape=(*TIED, *FEW_HEADS)), tp=4, dp=1, sanity=True),
        cube(GPT2, sanity=True, zero=0),
    ],
}
CASES = [
    *axes(LLAMA),
    *axes(GPT2),
    *cubes(),
    *(case for cases in NAMED.values() for case in cases),
]


@cache
def one_process(problem: Problem) -> Outcome:
    return train_case(Case(problem))


def check(case: Case) -> None:
    """Train it on its ranks, and compare what each of them has gathered with one process."""
    want = one_process(case.problem)
    if not case.validate:
        want = replace(want, validation=None)
    for got in [train_case(case)] if case.ranks == 1 else WORLD.run(train_case, case.ranks, case=case):
        assert_equal(got, want)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layout_gives_one_processs_numbers(case: Case) -> None:
    check(case)


@st.composite
def cases(draw: st.DrawFn, pp: int) -> Case:
    """Any layout that the config's rules let through, on 8 processes at most."""
    dp, tp = draw(st.sampled_from([(dp, tp) for dp in (1, 2, 3, 4) for tp in (1, 2, 4) if 1 < pp * dp * tp <= 8]))
    model = draw(st.sampled_from(("llama", "gpt2")))
    count = draw(st.integers(max(2, pp), 2 * pp + 1))  # two stages on a rank, and one layer more than stages
    shape = {"num_hidden_layers" if model == "llama" else "n_layer": count, "tie_word_embeddings": draw(st.booleans())}
    if model == "llama":
        shape["num_key_value_heads"] = draw(st.sampled_from((1, 2, 4)))
    else:
        shape |= dict(DROPOUT) if draw(st.booleans()) else {}
    micro_batches = draw(st.sampled_from((1, 2, 4) if pp > 1 else (1, 2)))
    problem = Problem(
        model=model,
        shape=tuple(shape.items()),
        samples=dp * micro_batches * draw(st.integers(1, 2)),
        masked=draw(st.booleans()),
        z_loss=model == "llama" and draw(st.booleans()),
        clip_grad=draw(st.sampled_from((None, 0.01, 1.0))),
        exclude=draw(st.sampled_from(((), (".*norm.*",)))),
    )
    case = Case(
        problem,
        dp=dp,
        tp=tp,
        pp=pp,
        engine=draw(st.sampled_from(("afab", "1f1b", "interleaved"))),
        stages_per_rank=draw(st.sampled_from((None, 1, 2))),
        micro_batches=micro_batches,
        sequence_parallel=draw(st.booleans()),
        overlap=draw(st.booleans()),
        gather_again=draw(st.booleans()),
        zero=draw(st.sampled_from((0, 1))),
        recompute=draw(st.sampled_from((False, True, "selective", "activation"))),
        small_buckets=draw(st.booleans()),
        pad_vocabulary=draw(st.sampled_from((1, 16))),
    )
    assume(not outcome(partial(config_of, case)))
    return case


@pytest.mark.parametrize("pp", [1, 2, 4])
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_layout_gives_one_processs_numbers(pp: int, data: st.DataObject) -> None:
    check(data.draw(cases(pp)))


@pytest.mark.long
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_layout_that_was_drawn_gives_one_processs_numbers(pp: int, data: st.DataObject) -> None:
    check(data.draw(cases(pp)))
