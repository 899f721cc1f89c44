"""AdamW over flat buffers, fused and plain, against torch.optim.AdamW."""

from collections.abc import Callable, Sequence

import pytest
import torch

from pentode.config.kinds.optimizers import AdamWOptimizerArgs
from pentode.dist.mesh import Axis
from pentode.optim import fused
from pentode.optim.adamw import AdamW, Update, update_
from pentode.optim.flat import Shard
from pentode.optim.groups import Group
from pentode.optim.layout import ALIGN
from pentode.optim.master import MasterWeights
from pentode.optim.registry import build_optimizer
from pentode.parallel.spec import ParamSpec, parameter
from tests.helpers.masters import weights, whole

SHAPES = {"embed.weight": (7, 5), "layers.0.w": (31, 9), "layers.0.bias": (31,), "layers.1.w": (3, 3, 3)}
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1
YES = torch.tensor(True)
ONE = torch.tensor(1.0)


def make(
    dtype: torch.dtype, *, use_fused: bool, accumulate_in: torch.dtype | None = None, update: Update | None = None
) -> tuple[MasterWeights, AdamW]:
    """Masters of four parameters, biases not decayed, in several buckets."""
    torch.manual_seed(0)
    parameters = {}
    for name, shape in SHAPES.items():
        parameters[name] = parameter(ParamSpec(shape), device=torch.device("cpu"), dtype=dtype)
        torch.nn.init.normal_(parameters[name])
    master = MasterWeights(
        parameters,
        groups=[
            Group(tuple(name for name in SHAPES if "bias" not in name), DECAY),
            Group(("layers.0.bias",), 0.0),
        ],
        data=Axis("data"),
        bucket_bytes=100,
        accumulate_in=accumulate_in or torch.promote_types(dtype, torch.float32),
    )
    return master, AdamW(master.shards, betas=BETAS, eps=EPS, use_fused=use_fused, update=update)


def give(master: MasterWeights, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for gradient in master.gradients.values():
        gradient.copy_(torch.randn(gradient.shape, generator=generator))


def snapshot(master: MasterWeights, optimizer: AdamW) -> list[torch.Tensor]:
    tensors = [shard.weight for shard in master.shards] + [optimizer.updates]
    tensors += [t for moments in optimizer.state().values() for t in moments]
    return [t.clone() for t in tensors]


@pytest.mark.parametrize("use_fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_torch_with_scaled_gradients_and_decay_groups(dtype: torch.dtype, use_fused: bool) -> None:
    master, optimizer = make(dtype, use_fused=use_fused)
    assert optimizer.fused == use_fused
    theirs = {name: torch.nn.Parameter(w.detach().clone()) for name, w in weights(master).items()}
    reference = torch.optim.AdamW(
        [
            {"params": [p for name, p in theirs.items() if "bias" not in name], "weight_decay": DECAY},
            {"params": [theirs["layers.0.bias"]], "weight_decay": 0.0},
        ],
        betas=BETAS,
        eps=EPS,
    )
    scale = torch.tensor(0.3)
    for step in range(20):
        give(master, seed=step)
        for name, p in theirs.items():
            p.grad = master.gradients[name] * scale
        for group in reference.param_groups:
            group["lr"] = 0.1 / (step + 1)
        reference.step()
        optimizer.step(learning_rate=0.1 / (step + 1), scale=scale, finite=YES)
    assert optimizer.updates == 20
    for name, p in theirs.items():
        torch.testing.assert_close(weights(master)[name], p.detach())
        for kind, moments in optimizer.state().items():
            torch.testing.assert_close(whole(master, moments)[name], reference.state[p][kind])
    held = sum(torch.count_nonzero(shard.weight) for shard in master.shards)
    assert held == sum(torch.count_nonzero(w) for w in weights(master).values())  # padding stays zero


@pytest.mark.parametrize("use_fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_leaves_no_trace(
    dtype: torch.dtype, use_fused: bool, bad: float
) -> None:
    runs = []
    for with_bad_step in (False, True):
        master, optimizer = make(dtype, use_fused=use_fused)
        for step in range(6):
            if with_bad_step and step == 3:
                before = snapshot(master, optimizer)
                give(master, seed=99)
                master.gradients["layers.0.w"][2, 1] = bad
                optimizer.step(learning_rate=0.1, scale=torch.tensor(float("nan")), finite=~YES)
                for now, then in zip(snapshot(master, optimizer), before, strict=True):
                    assert torch.equal(now, then)
            give(master, seed=step)
            optimizer.step(learning_rate=0.1, scale=ONE, finite=YES)
        runs.append(snapshot(master, optimizer))
    for clean, hit in zip(*runs, strict=True):
        assert torch.equal(clean, hit)


@pytest.mark.parametrize("use_fused", [True, False])
def test_gradients_in_bfloat16_step_float32_masters(use_fused: bool) -> None:
    narrow, narrow_optimizer = make(torch.bfloat16, use_fused=use_fused, accumulate_in=torch.bfloat16)
    wide, wide_optimizer = make(torch.bfloat16, use_fused=use_fused)
    for step in range(5):
        give(narrow, seed=step)
        for name, gradient in narrow.gradients.items():
            wide.gradients[name].copy_(gradient)
        for optimizer in (narrow_optimizer, wide_optimizer):
            optimizer.step(learning_rate=0.01, scale=torch.tensor(0.5), finite=YES)
    for name, weight in weights(wide).items():
        torch.testing.assert_close(weights(narrow)[name], weight)


@pytest.mark.parametrize("use_fused", [True, False])
def test_writing_the_state_back_continues_bit_for_bit(use_fused: bool) -> None:
    master, optimizer = make(torch.float32, use_fused=use_fused)
    other, restored = make(torch.float32, use_fused=use_fused)
    for step in range(3):
        give(master, seed=step)
        optimizer.step(learning_rate=0.1, scale=ONE, finite=YES)
    restored.updates.fill_(int(optimizer.updates))
    for ours, theirs in zip(master.shards, other.shards, strict=True):
        theirs.weight.copy_(ours.weight)
    for kind, tensors in optimizer.state().items():
        for tensor, into in zip(tensors, restored.state()[kind], strict=True):
            into.copy_(tensor)
    for m, o in ((master, optimizer), (other, restored)):
        give(m, seed=3)
        o.step(learning_rate=0.1, scale=ONE, finite=YES)
    for a, b in zip(snapshot(master, optimizer), snapshot(other, restored), strict=True):
        assert torch.equal(a, b)


KINDS = [  # model, gradients
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]


def equal_the_plain_form(update: Update, dtype: torch.dtype, gradients: torch.dtype) -> None:
    """Make steps with `update` and in plain form, one of them not finite, and compare all that they change."""
    plain, plain_optimizer = make(dtype, use_fused=False, accumulate_in=gradients)
    master, optimizer = make(dtype, use_fused=True, accumulate_in=gradients, update=update)
    assert not optimizer.fused
    for step in range(6):
        finite = torch.tensor(step != 3)
        scale = torch.tensor(0.3 if step != 3 else torch.nan)
        rate = 0.1 / (step + 1) if step % 2 else torch.tensor(0.1 / (step + 1), dtype=torch.float64)
        before = snapshot(master, optimizer) + [shard.model.clone() for shard in master.shards]
        for weights_, one in ((plain, plain_optimizer), (master, optimizer)):
            give(weights_, seed=step)
            if step == 3:
                weights_.gradients["layers.0.w"][2, 1] = torch.inf
            one.step(learning_rate=rate, scale=scale, finite=finite)
        after = snapshot(master, optimizer) + [shard.model.clone() for shard in master.shards]
        if step == 3:
            assert all(torch.equal(now, then) for now, then in zip(after, before, strict=True))
        else:
            assert not any(torch.equal(now, then) for now, then in zip(after, before, strict=True))
        for shard in master.shards:
            assert torch.equal(shard.model, shard.weight.to(dtype))
        for got, want in zip(snapshot(master, optimizer), snapshot(plain, plain_optimizer), strict=True):
            torch.testing.assert_close(got, want)
    held = sum(torch.count_nonzero(shard.weight) for shard in master.shards)
    assert held == sum(torch.count_nonzero(w) for w in weights(master).values())  # padding stays zero


@pytest.mark.parametrize(("dtype", "gradients"), KINDS)
def test_an_update_in_one_pass_equals_the_plain_form(dtype: torch.dtype, gradients: torch.dtype) -> None:
    given: list[torch.Size] = []

    def update(*tensors: torch.Tensor | None) -> None:
        given.append(tensors[0].shape)
        update_(*tensors)

    equal_the_plain_form(update, dtype, gradients)
    assert len(given) == 6 * len(make(dtype, use_fused=False)[0].shards), "one pass a shard"
    assert {shape[1] for shape in given} == {ALIGN}


@pytest.mark.long  # the compiler takes a minute
@pytest.mark.parametrize(("dtype", "gradients"), KINDS)
def test_the_compiled_update_equals_the_plain_form(dtype: torch.dtype, gradients: torch.dtype) -> None:
    torch.compiler.reset()
    equal_the_plain_form(torch.compile(update_, fullgraph=True, dynamic=True), dtype, gradients)


def test_the_update_is_for_those_who_want_the_fused_one() -> None:
    assert make(torch.float32, use_fused=False, update=update_)[1].update is None


def shards(dtype: torch.dtype, decays: Sequence[float]) -> list[Shard]:
    """Shards of different lengths, one for each weight decay, with gradients."""
    made = []
    for i, decay in enumerate(decays):
        model = torch.randn(ALIGN * (i + 1), dtype=dtype)
        weight = model if dtype == torch.float32 else model.float()
        made.append(Shard(0, model.numel(), weight, model, torch.randn(model.shape), decay))
    return made


@pytest.mark.parametrize("how", ["plain", "fused", "one pass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_shard_is_told_of_in_order_when_its_model_has_the_new_weights(dtype: torch.dtype, how: str) -> None:
    made = shards(dtype, [DECAY, DECAY, 0.0, 0.0, DECAY])
    update = update_ if how == "one pass" else None
    optimizer = AdamW(made, betas=BETAS, eps=EPS, use_fused=how != "plain", update=update)
    then, told = [shard.model.clone() for shard in made], []

    def stepped(shard: Shard) -> None:
        assert torch.equal(shard.model, shard.weight.to(dtype))
        assert not torch.equal(shard.model, then[made.index(shard)])
        told.append(shard)

    optimizer.step(learning_rate=0.1, scale=ONE, finite=YES, stepped=stepped)
    assert told == made


def test_the_registry_reads_the_config() -> None:
    master, _ = make(torch.float32, use_fused=False)
    for wanted in (True, False):
        args = AdamWOptimizerArgs(adam_eps=1e-7, adam_beta1=0.8, adam_beta2=0.99, torch_adam_is_fused=wanted)
        optimizer = build_optimizer(args, master.shards)
        assert isinstance(optimizer, AdamW)
        assert (optimizer.betas, optimizer.eps, optimizer.fused) == ((0.8, 0.99), 1e-7, wanted)


@pytest.mark.parametrize("broken", [None, lambda *args: None])
def test_a_torch_without_the_fused_operator_gets_the_plain_form(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[..., None] | None
) -> None:
    if broken is None:
        monkeypatch.delattr(torch, "_fused_adamw_")
    else:
        monkeypatch.setattr(torch, "_fused_adamw_", broken)  # another signature: keywords are refused
    assert not fused.usable(torch.zeros(1))
    assert not make(torch.float32, use_fused=True)[1].fused


def test_the_fused_operator_gets_a_rate_that_a_gpu_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    master, optimizer = make(torch.float32, use_fused=True)
    real, given = torch._fused_adamw_, []

    def spy(*tensors: object, **options: object) -> None:
        given.append(options["lr"])
        real(*tensors, **options)

    monkeypatch.setattr(torch, "_fused_adamw_", spy)
    monkeypatch.setattr(fused.devices, "is_gpu", lambda device: True)
    give(master, seed=0)
    optimizer.step(learning_rate=torch.tensor(0.1, dtype=torch.float64), scale=ONE, finite=YES)
    assert {rate.dtype for rate in given} == {torch.float32}
