"""Two processes over gloo give the numbers of one: layers, whole models and collectives, in float64."""

import dataclasses

import pytest
import torch
from torch import Tensor

from pentode.config.kinds.gpt2 import GPT2Config
from pentode.config.kinds.llama import LlamaConfig
from pentode.config.kinds.shape import Shape
from pentode.dist import collectives
from pentode.dist.mesh import Axis, Mesh
from pentode.models.registry import model_for
from pentode.nn.causal_lm import CausalLM, Part
from pentode.nn.init import initialise
from pentode.parallel.batch import Batch, batch_of
from pentode.parallel.spec import specs_of
from pentode.run.build import padded_vocabulary
from tests.helpers.spawn import run_on_ranks

SHAPES = (
    LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=37,
    ),
    GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=16, vocab_size=37),  # tied, with all three dropouts
    GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=3, tie_word_embeddings=False),
)


def batch() -> Batch:
    rows = torch.randint(3, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 3:5] = False
    return batch_of(rows, samples=torch.tensor([7, 12]), mask=mask)


def model(shape: Shape, mesh: Mesh, *, sequence_parallel: bool) -> CausalLM:
    built = model_for(shape).build(
        shape,
        mesh,
        Part.whole(shape.num_layers),
        device=torch.device("cpu"),
        dtype=torch.float64,
        vocab_size_padded=48,
        sequence_parallel=sequence_parallel,
        seed=5,
    )
    built.z_loss = 0.01
    initialise(dict(built.named_parameters()), specs_of(built), std=0.3, residual_std=0.1, seed=1)
    return built.train()


def two_ranks_equal_one(*, compiled: bool) -> None:
    mesh = Mesh.build(tp=2)
    for shape in SHAPES[:2] if compiled else SHAPES:
        one = model(shape, Mesh.single(), sequence_parallel=False)
        want = one(None, batch())
        want.backward()
        for sequence_parallel in (False, True):
            both = model(shape, mesh, sequence_parallel=sequence_parallel)
            if compiled:
                both.run_block = torch.compile(both.run_block, fullgraph=True, backend="aot_eager")
            loss = both(None, batch())
            loss.backward()
            torch.testing.assert_close(loss, want)
            for name, param in both.named_parameters():
                spec, grad = param.spec, param.grad
                if spec.sum_over is not None:
                    collectives.sum_(grad, spec.sum_over)
                expected = spec.take(_unpadded(one.get_parameter(name).grad, spec.global_shape))
                torch.testing.assert_close(grad, expected, msg=lambda text, name=name: f"{name}: {text}")
        if not compiled:
            plain = model(shape, mesh, sequence_parallel=False).eval()
            torch.testing.assert_close(plain.logits(None, batch()), one.eval().logits(None, batch()))


def _unpadded(whole: Tensor, shape: tuple[int, ...]) -> Tensor:
    assert not whole[shape[0] :].any(), "padded rows have a gradient"
    return whole[: shape[0]]


def collectives_are_what_they_say() -> None:
    mesh = Mesh.build(dp=2)
    axis, rank = mesh.dp, mesh.dp.rank
    assert (axis.size, mesh.data.size, mesh.tp.size, mesh.model.size) == (2, 2, 1, 1)
    x = (torch.arange(6.0, dtype=torch.float64).view(2, 3) + 10 * rank).requires_grad_()
    both = torch.stack((x.detach() - 10 * rank, x.detach() - 10 * rank + 10))
    cases = {
        "replicate": (collectives.replicate(x, axis), both[rank], 3.0),  # the ranks' weights 1 and 2 are summed
        "all_reduce": (collectives.all_reduce(x, axis), both.sum(0), 1.0 + rank),
        "all_gather": (collectives.all_gather(x, axis, dim=1), torch.cat(tuple(both), dim=1), 3.0),
        "reduce_scatter": (collectives.reduce_scatter(x, axis), both.sum(0)[rank : rank + 1], None),
    }
    for name, (got, want, slope) in cases.items():
        assert torch.equal(got, want), name
        x.grad = None
        (got * (1.0 + rank)).sum().backward()
        expected = torch.tensor([[1.0], [2.0]]) if slope is None else torch.tensor(slope)
        assert torch.equal(x.grad, expected.expand(2, 3).to(x.grad)), name
    assert torch.equal(collectives.all_max(x, axis), both[1])
    assert torch.equal(collectives.sum_(x.detach().clone(), axis), both.sum(0))
    assert torch.equal(collectives.max_(x.detach().clone(), axis), both[1])
    later = x.detach().clone()
    collectives.start_sum_(later, axis).wait()
    assert torch.equal(later, both.sum(0))
    with pytest.raises(ValueError, match=r"dp=2 does not divide dim 0 of \[3, 1\]"):
        collectives.reduce_scatter(torch.ones(3, 1), axis)
    with pytest.raises(ValueError, match="pp=1 x dp=1 x cp=1 x tp=3 = 3 ranks, but WORLD_SIZE is 2"):
        Mesh.build(tp=3)


def test_two_ranks_give_one_process_s_loss_and_every_gradient() -> None:
    run_on_ranks(two_ranks_equal_one, 2, compiled=False)


@pytest.mark.long
def test_compiled_blocks_with_collectives_inside_give_the_same() -> None:
    run_on_ranks(two_ranks_equal_one, 2, compiled=True)


def test_collectives_are_what_they_say_on_two_ranks() -> None:
    run_on_ranks(collectives_are_what_they_say, 2)


def test_a_vocabulary_is_padded_to_the_next_multiple() -> None:
    assert [padded_vocabulary(size, 16) for size in (1, 16, 37)] == [16, 16, 48]


def test_heads_that_tp_does_not_divide_are_refused() -> None:
    mesh = dataclasses.replace(Mesh.single(), tp=Axis("tp", size=4))
    with pytest.raises(ValueError, match="tp=4 does not divide 2 key/value heads"):
        model(SHAPES[0], mesh, sequence_parallel=False)
