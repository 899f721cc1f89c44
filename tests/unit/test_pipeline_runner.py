"""A pipeline of several stages on one rank gives the loss and the gradients of the model in one piece."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pentode.dist.mesh import Axis, Mesh
from pentode.dist.p2p import Form, Tensors, connect
from pentode.models.registry import model_for
from pentode.nn.causal_lm import CausalLM, Part
from pentode.parallel.batch import Batch, batch_of
from pentode.parallel.pipeline.runner import Pipeline, Stage
from pentode.parallel.pipeline.schedules import Action, Schedule
from pentode.parallel.pipeline.simulate import needed, simulate
from tests.helpers.cases import Case, Problem, batches_of, config_of

WIDTH, VOCABULARY = 6, 11
CPU = torch.device("cpu")


def weight(*shape: int, seed: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


class Rows(nn.Module):
    """A stage that passes hidden rows, how often each token was seen (int64), and a scale for each row.

    `unused` is "scale" if nothing is made of the scales, which then get no gradient.
    """

    def __init__(self, number: int, *, last: int, unused: str = "") -> None:
        super().__init__()
        self.number, self.last, self.unused = number, last, unused
        self.table = weight(VOCABULARY, WIDTH, seed=number)
        self.mix = weight(WIDTH, WIDTH, seed=number + 100)

    def forward(self, x: Tensor | Tensors | None, batch: Batch) -> Tensor | Tensors:
        if self.number == 0:
            hidden, counts = (
                self.table[batch.tokens],
                batch.tokens.bincount(minlength=VOCABULARY)[batch.tokens] % VOCABULARY,
            )
            scale = hidden.mean(1, keepdim=True)
        else:
            assert isinstance(x, tuple)
            hidden, counts, scale = x
            assert counts.dtype == torch.int64
        if self.unused != "scale":
            hidden = hidden * (1 + scale)
        hidden = torch.tanh(hidden @ self.mix) + self.table[counts]
        if self.number < self.last:
            return hidden, (counts + 1) % VOCABULARY, scale * 0.5
        logits = hidden @ self.table.T
        return nn.functional.cross_entropy(logits, batch.labels, reduction="sum")

    def takes(self, batch: Batch) -> tuple[Form, ...]:
        rows = len(batch.tokens)
        return (
            Form((rows, WIDTH), torch.float64),
            Form((rows,), torch.int64),
            Form((rows, 1), torch.float64),
        )

    gives = takes


def rows_of(stages: int, **options: str) -> list[Rows]:
    return [Rows(number, last=stages - 1, **options) for number in range(stages)]


def batches(count: int) -> list[Batch]:
    rows = torch.randint(VOCABULARY, (count, 2, 5), generator=torch.Generator().manual_seed(3))
    return [batch_of(r, samples=torch.arange(2)) for r in rows]


def plain(stages: Sequence[Stage], found: Sequence[Batch], scale: Tensor) -> Tensor:
    """Loss of the stages one after the other, as one model; gradients are added to the weights'."""
    total = torch.zeros_like(scale)
    for batch in found:
        x: Tensor | Tensors | None = None
        for stage in stages:
            x = stage(x, batch)
        assert isinstance(x, Tensor)
        (x * scale).backward()
        total += (x * scale).detach()
    return total


def pipeline(stages: Sequence[Stage], program: Sequence[Action]) -> Pipeline:
    """All stages on this one rank, run in the order of a program made by hand."""
    schedule = Schedule("by hand", (0,) * len(stages), (tuple(program),))
    simulate(schedule)
    return Pipeline(dict(enumerate(stages)), schedule, connect(Axis("pp"), device=CPU))


def in_turn(stages: int, micro_batches: int) -> list[Action]:
    """One micro-batch after the other, forward and backward."""
    forward, backward = range(stages), reversed(range(stages))
    each = [("F", stage) for stage in forward] + [("B", stage) for stage in backward]
    return [Action(kind, stage, i) for i in range(micro_batches) for kind, stage in each]


def gradients(stages: Sequence[nn.Module]) -> dict[str, Tensor | None]:
    return {f"{number}.{name}": p.grad for number, s in enumerate(stages) for name, p in s.named_parameters()}


@st.composite
def orders(draw: st.DrawFn) -> tuple[int, int, list[Action]]:
    """Stages, micro-batches, and any order of their actions that needs allow."""
    stages, micro_batches = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    schedule = Schedule("drawn", (0,) * stages, ((),))
    left, done = sorted(in_turn(stages, micro_batches)), list[Action]()
    while left:
        ready = [action for action in left if all(need in done for need in needed(action, schedule))]
        done.append(draw(st.sampled_from(ready)))
        left.remove(done[-1])
    return stages, micro_batches, done


@settings(max_examples=40)
@given(orders(), st.sampled_from(["", "scale"]))
def test_any_order_gives_the_loss_and_gradients_of_the_model_in_one_piece(
    order: tuple[int, int, list[Action]], unused: str
) -> None:
    count, micro_batches, program = order
    ours, theirs, scale = rows_of(count, unused=unused), rows_of(count, unused=unused), torch.tensor(0.3).double()
    want = plain(theirs, batches(micro_batches), scale)
    got = pipeline(ours, program).forward_backward(batches(micro_batches), scale=scale)
    torch.testing.assert_close(got, want)
    assert not got.requires_grad
    for name, gradient in gradients(theirs).items():
        torch.testing.assert_close(gradients(ours)[name], gradient, msg=lambda text, n=name: f"{n}: {text}")


def test_gradients_gather_over_steps() -> None:
    stages, scale = rows_of(3), torch.ones((), dtype=torch.float64)
    run = pipeline(stages, in_turn(3, 2))
    run.forward_backward(batches(2), scale=scale)
    once = {name: gradient.clone() for name, gradient in gradients(stages).items() if gradient is not None}
    run.forward_backward(batches(2), scale=scale)
    for name, gradient in once.items():
        torch.testing.assert_close(gradients(stages)[name], 2 * gradient)


def test_forward_gives_the_loss_of_any_number_of_micro_batches_and_no_gradient() -> None:
    stages, scale = rows_of(3), torch.tensor(0.3).double()
    run = pipeline(stages, in_turn(3, 2))
    for count in (1, 2, 5):
        want = plain(rows_of(3), batches(count), scale)
        torch.testing.assert_close(run.forward(batches(count), scale=scale), want)
    assert not any(gradient is not None for gradient in gradients(stages).values())


def test_forward_of_nothing_is_zero() -> None:
    got = pipeline(rows_of(2), in_turn(2, 1)).forward([], scale=torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(got, torch.zeros((), dtype=torch.float64))


def test_output_is_what_the_last_stage_makes_unscaled() -> None:
    stages = rows_of(3)
    (batch,) = batches(1)
    x: Tensor | Tensors | None = None
    with torch.no_grad():
        for stage in stages:
            x = stage(x, batch)
    got = pipeline(stages, in_turn(3, 2)).output(batch)
    assert isinstance(got, Tensor)
    assert not got.requires_grad
    torch.testing.assert_close(got, x, rtol=0, atol=0)


class Fork(nn.Module):
    """A stage that passes on what it was given beside its own result, and may be frozen."""

    def __init__(self, number: int, *, last: int) -> None:
        super().__init__()
        self.number, self.last = number, last
        self.w = weight(WIDTH, WIDTH, seed=number)

    def forward(self, x: Tensor | Tensors | None, batch: Batch) -> Tensor | Tensors:
        if self.number == 0:
            first = torch.ones(len(batch.tokens), WIDTH, dtype=torch.float64)
            return first @ self.w, first
        assert isinstance(x, tuple)
        new, old = x
        return (new @ self.w + old).sum() if self.number == self.last else (new @ self.w, new)

    def takes(self, batch: Batch) -> tuple[Form, ...]:
        return (Form((len(batch.tokens), WIDTH), torch.float64),) * 2

    gives = takes


@pytest.mark.parametrize("frozen", [(), (0,), (0, 1), (3,)])
def test_a_stage_may_pass_on_what_it_was_given_and_may_need_no_gradient(frozen: tuple[int, ...]) -> None:
    ours, theirs = ([Fork(number, last=3) for number in range(4)] for _ in range(2))
    for stages in (ours, theirs):
        for number in frozen:
            stages[number].w.requires_grad_(False)
    scale = torch.ones((), dtype=torch.float64)
    want = plain(theirs, batches(2), scale)
    got = pipeline(ours, in_turn(4, 2)).forward_backward(batches(2), scale=scale)
    torch.testing.assert_close(got, want)
    for name, gradient in gradients(theirs).items():
        torch.testing.assert_close(gradients(ours)[name], gradient, msg=lambda text, n=name: f"{n}: {text}")


def test_without_backward_nothing_is_kept_for_it() -> None:
    run, scale = pipeline(rows_of(2), in_turn(2, 2)), torch.ones((), dtype=torch.float64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        run.forward(batches(2), scale=scale)
        run.output(batches(1)[0])
        assert not kept
        run.forward_backward(batches(2), scale=scale)
        assert kept


@pytest.mark.parametrize("count", [1, 3])
def test_other_micro_batches_than_the_schedules_are_refused(count: int) -> None:
    run = pipeline(rows_of(2), in_turn(2, 2))
    with pytest.raises(ValueError) as error:
        run.forward_backward(batches(count), scale=torch.ones((), dtype=torch.float64))
    assert str(error.value) == f"forward_backward: {count} micro-batches, but by hand is made for 2"


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_language_model_in_stages_is_the_language_model(model: str) -> None:
    case = Case(Problem(model, masked=True), micro_batches=2)
    whole, *stages = (part_of(case, *cut) for cut in ((0, 4), (0, 1), (1, 3), (3, 4)))
    for number, parameter in enumerate(whole.parameters()):
        parameter.data = weight(*parameter.shape, seed=number).data * 0.2
    weights = whole.state_dict()
    for stage in stages:
        stage.load_state_dict({name: weights[name] for name in stage.state_dict()})
    found, scale = batches_of(case, Mesh.single(), 0), torch.tensor(0.1).double()
    want = plain([whole], found, scale)
    got = pipeline(stages, in_turn(3, 2)).forward_backward(found, scale=scale)
    torch.testing.assert_close(got, want)
    held: dict[str, Tensor] = {}
    for name, parameter in (pair for stage in stages for pair in stage.named_parameters()):
        assert parameter.grad is not None, name
        held[name] = held.get(name, 0) + parameter.grad  # a tied table has a copy at either end
    assert sorted(held) == sorted(name for name, _ in whole.named_parameters())
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(held[name], parameter.grad, msg=lambda text, n=name: f"{n}: {text}")


def part_of(case: Case, begin: int, end: int) -> CausalLM:
    """Some layers of a case's model of four, with the ends that belong to them."""
    shape = config_of(case).model.model_config
    part = Part(range(begin, end), first=begin == 0, last=end == 4)
    return model_for(shape).build(
        shape, Mesh.single(), part, device=CPU, dtype=torch.float64, vocab_size_padded=shape.vocab_size
    )
