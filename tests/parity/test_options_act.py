"""Options that change no number do change what a step does: its operators, its buckets, the order of its program."""

from collections import Counter
from typing import Any

import pytest
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from pentode.train.step import train_step
from tests.helpers.cases import Case, Problem, batches_of, run_of
from tests.helpers.world import WORLD

LLAMA = Problem(shape=(("num_hidden_layers", 2),))
LAYERS = 4  # of a Problem that does not say


class Operators(TorchDispatchMode):
    """Counts the operators that are called while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: object, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.counts[str(function).split("::")[-1].split(".")[-2]] += 1
        return function(*args, **(kwargs or {}))


def what_a_step_does(case: Case) -> tuple[Counter[str], int, list[str]]:
    """The operators of a rank's first step, its buckets, and its program."""
    run = run_of(case)
    with Operators() as operators:
        train_step(run, batches_of(case, run.mesh, 0), learning_rate=1e-2)
    return operators.counts, len(run.master._buckets), [str(action) for action in run.pipeline.program]


def first_of(case: Case) -> tuple[Counter[str], int, list[str]]:
    return WORLD.run(what_a_step_does, case.ranks, case=case)[0]


def test_communication_goes_under_products_where_it_is_asked_to() -> None:
    plain, _, _ = first_of(Case(LLAMA, tp=2, sequence_parallel=True))
    found, _, _ = first_of(Case(LLAMA, tp=2, sequence_parallel=True, overlap=True))
    assert not {"gather_matmul", "matmul_scatter"} & plain.keys()
    assert [found["gather_matmul"], found["matmul_scatter"]] == [2 * 4, 2 * 2]  # two layers; qkv, gate and up both ways
    assert found["mm"] < plain["mm"]
    assert found["all_gather_into_tensor"] < plain["all_gather_into_tensor"]


def test_inputs_are_gathered_again_unless_they_are_kept() -> None:
    again, _, _ = first_of(Case(LLAMA, tp=2, sequence_parallel=True))
    kept, _, _ = first_of(Case(LLAMA, tp=2, sequence_parallel=True, gather_again=False))
    assert [again["gather_after"], kept["gather_after"]] == [2 * 2, 0]


def test_blocks_run_again_as_far_as_they_are_asked_to() -> None:
    plain, _, _ = first_of(Case(LLAMA))
    selective, _, _ = first_of(Case(LLAMA, recompute="selective"))
    whole, _, _ = first_of(Case(LLAMA, recompute=True))
    activation, _, _ = first_of(Case(LLAMA, recompute="activation"))
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert [case["silu"] for case in (plain, activation, selective, whole)] == [2, 4, 4, 4]
    assert [case[attention] for case in (plain, activation, selective, whole)] == [2, 2, 2, 4]
    assert plain["mm"] == activation["mm"] == selective["mm"] < whole["mm"]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_activations_are_had_again_without_a_message_or_a_product(sequence_parallel: bool) -> None:
    plain, _, _ = first_of(Case(LLAMA, tp=2, sequence_parallel=sequence_parallel))
    again, _, _ = first_of(Case(LLAMA, tp=2, sequence_parallel=sequence_parallel, recompute="activation"))
    for name in ("mm", "all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor"):
        assert again[name] == plain[name]
    assert plain["reduce_scatter_tensor" if sequence_parallel else "all_reduce"]
    assert again["silu"] == 2 * plain["silu"]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_activations_to_compute_again_are_not_kept(model: str) -> None:
    problem = Problem(model=model)
    kept, again = (kept_by_a_step(Case(problem, recompute=how)) for how in (False, "activation"))
    config = run_of(Case(problem)).config
    shape, tokens = config.model.model_config, config.tokens
    wide = tokens.micro_batch_size * tokens.sequence_length * shape.ffn_width
    assert kept - again >= LAYERS * tokens.batch_accumulation_per_replica * wide


def kept_by_a_step(case: Case) -> int:
    """The numbers that a step keeps from forward to backward, weights left out, each storage once."""
    run, found = run_of(case), dict[int, int]()
    weights = {p.untyped_storage().data_ptr() for stage in run.stages.values() for p in stage.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes() // tensor.itemsize
            alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        train_step(run, batches_of(case, run.mesh, 0), learning_rate=1e-2)
    return sum(found.values())


def test_small_buckets_are_more_messages() -> None:
    (few, one, _), (many, five, _) = first_of(Case(LLAMA, dp=2)), first_of(Case(LLAMA, dp=2, small_buckets=True))
    assert one < five
    assert many["allreduce_"] - few["allreduce_"] == five - one


def test_schedules_have_their_own_order() -> None:
    programs = {engine: first_of(Case(LLAMA, pp=2, engine=engine, micro_batches=4))[2] for engine in ("afab", "1f1b")}
    orders = {name: [act[:2] for act in program if act[0] in "FB"] for name, program in programs.items()}
    assert orders["afab"] == ["F0", "F1", "F2", "F3", "B0", "B1", "B2", "B3"]
    assert orders["1f1b"] == ["F0", "F1", "B0", "F2", "B1", "F3", "B2", "B3"]
