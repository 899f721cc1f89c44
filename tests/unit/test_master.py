"""MasterWeights: flat buffers, the way of a gradient into them, and what the model sees of a step."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from pentode.dist.mesh import Axis, Mesh
from pentode.optim import master as master_module
from pentode.optim.groups import Group
from pentode.optim.layout import ALIGN
from pentode.optim.master import MasterWeights
from pentode.parallel.spec import ParamSpec, parameter
from tests.helpers.masters import publish, weights
from tests.helpers.spawn import run_on_ranks

MIB = 2**20
VOCABULARY, WIDTH, LAYERS = 11, 17, 3  # odd, so that padding is needed everywhere


class Block(nn.Module):
    """A residual block with a matrix, a bias and a weight that only some inputs reach."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = weight(WIDTH, WIDTH, dtype=dtype)
        self.bias = weight(WIDTH, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.up.T + self.bias)


class Model(nn.Module):
    """Tied embedding, blocks, and `expert`, which takes part only when it is asked to."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.ParameterDict({"weight": weight(VOCABULARY, WIDTH, dtype=dtype)})
        self.layers = nn.ModuleList(Block(dtype) for _ in range(LAYERS))
        self.expert = nn.ParameterDict({"weight": weight(WIDTH, dtype=dtype)})

    def forward(self, tokens: Tensor, *, use_expert: bool = True) -> Tensor:
        x = self.embed["weight"][tokens]
        for block in self.layers:
            x = block(x)
        if use_expert:
            x = x * self.expert["weight"]
        return (x @ self.embed["weight"].T).float().square().mean()


def weight(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    made = parameter(ParamSpec(shape), device=torch.device("cpu"), dtype=dtype)
    nn.init.normal_(made, std=0.3)
    return made


def model_of(dtype: torch.dtype, *, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(dtype)


def master_of(
    model: nn.Module,
    *,
    data: Axis | None = None,
    bucket_bytes: int = MIB,
    accumulate_in: torch.dtype | None = None,
    no_decay: Sequence[str] = (),
) -> MasterWeights:
    parameters = dict(model.named_parameters())
    groups = [Group(tuple(n for n in parameters if n not in no_decay), 0.1), Group(tuple(no_decay), 0.0)]
    dtype = accumulate_in or torch.promote_types(next(model.parameters()).dtype, torch.float32)
    return MasterWeights(
        parameters, groups=groups, data=data or Axis("data"), bucket_bytes=bucket_bytes, accumulate_in=dtype
    )


def tokens(count: int, *, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (8,), generator=generator) for _ in range(count)]


def by_hand(model: Model, inputs: list[Tensor], *, dtype: torch.dtype, used: list[bool]) -> dict[str, Tensor]:
    """The sum of the micro-batches' gradients, in their order."""
    total: dict[str, Tensor] = {}
    for x, use_expert in zip(inputs, used, strict=True):
        model(x, use_expert=use_expert).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] = total[name] + p.grad.to(dtype) if name in total else p.grad.to(dtype)
            p.grad = None
    return {name: total.get(name, torch.zeros_like(p, dtype=dtype)) for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_parameters_become_aligned_views_that_keep_their_values(dtype: torch.dtype) -> None:
    model, twin = model_of(dtype), model_of(dtype)
    master = master_of(model, no_decay=("layers.1.bias", "expert.weight"))
    assert [flat.shards[0].weight_decay for flat in master.flat] == [0.1, 0.0]
    assert master.shares_storage == (dtype != torch.bfloat16)
    for (name, p), before in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, before)
        assert torch.equal(weights(master)[name], before.to(torch.promote_types(dtype, torch.float32)))
        assert p.storage_offset() * p.element_size() % 256 == 0
    for flat in master.flat:
        own = [p for n, p in model.named_parameters() if n in flat.layout.starts]
        assert all(p.untyped_storage().data_ptr() == flat.model.untyped_storage().data_ptr() for p in own)
        assert torch.count_nonzero(flat.model) == sum(torch.count_nonzero(p) for p in own)  # padding is zero


@pytest.mark.parametrize(
    ("dtype", "accumulate_in"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("used", [[True] * 4, [False, True, True, False], [False, False, True, True], [False] * 4])
@pytest.mark.parametrize(("together", "waiting"), [(0, 0), (WIDTH, 1 << 20), (WIDTH**2, 2 * WIDTH), (1 << 20, 1 << 20)])
def test_gradients_are_the_sum_over_micro_batches_bit_for_bit(
    dtype: torch.dtype,
    accumulate_in: torch.dtype,
    used: list[bool],
    together: int,
    waiting: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(master_module, "TOGETHER", together)
    monkeypatch.setattr(master_module, "WAITING", waiting)
    model = model_of(dtype)
    master = master_of(model, bucket_bytes=1000, accumulate_in=accumulate_in)
    for step in range(2):
        for flat in master.flat:  # whatever is left from before must not count; padding stays zero
            for view in flat.layout.views(flat.gradient).values():
                view.fill_(7.0)
        inputs = tokens(4, seed=step)
        master.start_step(4)
        for x, use_expert in zip(inputs, used, strict=True):
            model(x, use_expert=use_expert).backward()
            assert all(p.grad is None for p in model.parameters())
        master.finish_gradients()
        for name, gradient in by_hand(model_of(dtype), inputs, dtype=accumulate_in, used=used).items():
            assert master.gradients[name].dtype == accumulate_in
            assert torch.equal(master.gradients[name], gradient), name


@pytest.mark.parametrize("waiting", [1 << 20, 2 * WIDTH * WIDTH])
def test_small_gradients_are_moved_by_as_few_calls_as_may_be(waiting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(master_module, "WAITING", waiting)
    moved: list[tuple[list[int], bool]] = []
    move = master_module.move

    def counted(places: list[Tensor], gradients: list[Tensor], *, add: bool) -> None:
        moved.append(([gradient.numel() for gradient in gradients], add))
        move(places, gradients, add=add)

    monkeypatch.setattr(master_module, "move", counted)
    model = model_of(torch.float32)
    master = master_of(model)
    master.start_step(3)
    for x in tokens(3):
        model(x).backward()
    assert master._waiting == {}, "the bucket is complete"
    count = len(list(model.parameters()))
    assert sum(len(sizes) for sizes, _ in moved) == 3 * count
    assert all(sum(sizes) <= waiting for sizes, _ in moved)
    done = 0
    for (sizes, _), (later, _) in pairwise(moved):  # one more would have been too many, or of the next micro-batch
        done += len(sizes)
        assert sum(sizes) + later[0] > waiting or done % count == 0
    if waiting == 1 << 20:
        assert [(len(sizes), add) for sizes, add in moved] == [(count, False), (count, True), (count, True)]


def test_gradients_of_a_step_that_was_given_up_are_forgotten() -> None:
    model = model_of(torch.float32)
    master = master_of(model)
    master.start_step(2)
    model(tokens(1)[0]).backward()  # all wait for a second micro-batch, which does not come
    master.start_step(1)
    master.finish_gradients()
    assert not any(gradient.any() for gradient in master.gradients.values())


def test_masters_stay_float32_when_gradients_are_accumulated_in_bfloat16() -> None:
    master = master_of(model_of(torch.bfloat16), accumulate_in=torch.bfloat16)
    assert {shard.weight.dtype for shard in master.shards} == {torch.float32}
    elements = sum(flat.layout.size for flat in master.flat)
    assert master.bytes() == elements * (2 + 4 + 2)


def test_shared_storage_is_counted_once() -> None:
    master = master_of(model_of(torch.float32))
    assert master.bytes() == sum(flat.layout.size for flat in master.flat) * (4 + 4)


def test_a_parameter_of_another_dtype_gets_a_buffer_of_its_own() -> None:
    model = model_of(torch.bfloat16)
    model.expert["weight"] = weight(WIDTH, dtype=torch.float32)
    master = master_of(model)
    assert [flat.model.dtype for flat in master.flat] == [torch.bfloat16, torch.float32]
    assert master.flat[1].shares_storage
    assert not master.shares_storage


def test_a_gradient_that_is_none_counts_as_zero() -> None:
    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, x: Tensor, w: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
            return gradient * 2, None

    model = model_of(torch.float32)
    master = master_of(model)
    master.gradients["expert.weight"].fill_(7.0)
    master.start_step(1)
    Forgetful.apply(model.layers[0].bias, model.expert["weight"]).sum().backward()
    master.finish_gradients()
    assert torch.equal(master.gradients["expert.weight"], torch.zeros(WIDTH))
    assert torch.equal(master.gradients["layers.0.bias"], torch.full((WIDTH,), 2.0))


def test_a_backward_that_no_step_expects_is_refused() -> None:
    model = model_of(torch.float32)
    master = master_of(model)
    master.start_step(1)
    model(tokens(1)[0]).backward()
    with pytest.raises(AssertionError, match="start_step"):
        model(tokens(1)[0]).backward()


def test_an_abandoned_step_leaves_nothing_behind() -> None:
    model = model_of(torch.float64)
    master = master_of(model)
    inputs = tokens(3)
    master.start_step(2)
    model(inputs[0]).backward()
    master.start_step(2)
    for x in inputs[1:]:
        model(x).backward()
    master.finish_gradients()
    want = by_hand(model_of(torch.float64), inputs[1:], dtype=torch.float64, used=[True] * 2)
    assert all(torch.equal(master.gradients[name], gradient) for name, gradient in want.items())


def test_publish_rounds_masters_into_the_model() -> None:
    model = model_of(torch.bfloat16)
    master = master_of(model)
    with torch.no_grad():
        weights(master)["expert.weight"].fill_(1 + 2**-12)
    publish(master)
    assert torch.equal(model.expert["weight"], torch.ones(WIDTH, dtype=torch.bfloat16))
    assert weights(master)["expert.weight"][0] == 1 + 2**-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_blocks_see_published_weights_without_recompiling(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    model, twin = model_of(dtype), model_of(dtype)
    master = master_of(model)
    for block in model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    x = tokens(1)[0]
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            master.start_step(1)
            loss = model(x)
            loss.backward()
            master.finish_gradients()
        want = by_hand(twin, [x], dtype=torch.float32, used=[True])
        torch.testing.assert_close(loss, twin(x))
        torch.testing.assert_close(master.gradients, want)
        with torch.no_grad():
            for name, p in twin.named_parameters():
                weights(master)[name].add_(0.25)
                p.copy_(weights(master)[name])
        publish(master)


@pytest.mark.parametrize("bucket_bytes", [1, 2000, MIB])
def test_buckets_start_in_backward_order_and_as_soon_as_they_are_complete(
    monkeypatch: pytest.MonkeyPatch, bucket_bytes: int
) -> None:
    started: list[Tensor] = []
    monkeypatch.setattr(master_module, "start_sum_", lambda x, axis: started.append(x))
    model = model_of(torch.float32)
    master = master_of(model, bucket_bytes=bucket_bytes, no_decay=("layers.1.bias",))
    counts = []
    master.start_step(2)
    for x in tokens(2):
        model(x).backward()
        counts.append(len(started))
    buckets = sum(len(flat.layout.buckets) for flat in master.flat)
    assert counts == [0, buckets]
    master.finish_gradients()
    assert len(started) == buckets
    places = {master.gradients[name].data_ptr(): i for i, (name, _) in enumerate(model.named_parameters())}
    firsts = [places[bucket.data_ptr()] for bucket in started]  # each bucket's first parameter in the model
    assert firsts == sorted(firsts, reverse=True)


def test_a_bucket_waits_for_its_turn_when_an_earlier_one_lacks_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Tensor] = []
    monkeypatch.setattr(master_module, "start_sum_", lambda x, axis: started.append(x))
    model = model_of(torch.float32)
    master = master_of(model, bucket_bytes=1)
    master.start_step(1)
    model(tokens(1)[0], use_expert=False).backward()
    assert started == []  # another rank may have used the expert: the order of reductions must be the same on all
    master.finish_gradients()
    assert len(started) == sum(len(flat.layout.buckets) for flat in master.flat)


def gradients_of_two_ranks(*, bucket_bytes: int) -> None:
    """Each rank sees half of the micro-batches, and the expert is used on one rank only, or in one micro-batch."""
    data = Mesh.build(dp=2).data
    mine = slice(2 * data.rank, 2 * data.rank + 2)
    inputs = tokens(4)
    for dtype in (torch.float64, torch.bfloat16):
        for used in ([True, True, False, False], [False, True, False, True]):
            model = model_of(dtype)
            master = master_of(model, data=data, bucket_bytes=bucket_bytes, no_decay=("layers.1.bias",))
            want = by_hand(model_of(dtype), inputs, dtype=torch.promote_types(dtype, torch.float32), used=used)
            for _ in range(2):
                master.start_step(2)
                for x, use_expert in zip(inputs[mine], used[mine], strict=True):
                    model(x, use_expert=use_expert).backward()
                master.finish_gradients()
                torch.testing.assert_close(master.gradients, want)


@pytest.mark.parametrize("bucket_bytes", [1, 2000])
def test_two_data_ranks_have_the_gradients_of_one_process(bucket_bytes: int) -> None:
    run_on_ranks(gradients_of_two_ranks, 2, bucket_bytes=bucket_bytes)


def partial_gradients_of_two_ranks() -> None:
    tp = Mesh.build(tp=2).tp
    specs = {"layers.0.w": ParamSpec((5,)), "layers.0.norm": ParamSpec((5,), copies=tp, sum_over=tp)}
    model = {name: parameter(spec, device=torch.device("cpu"), dtype=torch.float32) for name, spec in specs.items()}
    groups = [Group(tuple(specs), 0.0)]
    master = MasterWeights(model, groups=groups, data=Axis("data"), bucket_bytes=1, accumulate_in=torch.float32)
    master.start_step(1)
    (sum(model.values()) * (tp.rank + 1)).sum().backward()
    master.finish_gradients()
    assert torch.equal(master.gradients["layers.0.w"], torch.full((5,), tp.rank + 1.0))
    assert torch.equal(master.gradients["layers.0.norm"], torch.full((5,), 3.0))


def test_a_gradient_that_is_a_partial_sum_is_summed_over_its_axis() -> None:
    run_on_ranks(partial_gradients_of_two_ranks, 2)


def test_a_gradient_that_is_not_moved_is_given_up_when_the_next_step_begins() -> None:
    model = nn.ParameterDict(
        {"large": weight(3, ALIGN, dtype=torch.bfloat16), "odd": weight(3, ALIGN + 1, dtype=torch.bfloat16)}
    )
    groups = [Group(("large", "odd"), 0.1)]
    master = MasterWeights(
        model,
        groups=groups,
        data=Axis("data"),
        bucket_bytes=MIB,
        accumulate_in=torch.bfloat16,
        unmoved_from=3 * ALIGN,
    )
    sizes = {flat.layout.size: flat.gradient.numel() for flat in master.flat}
    assert sizes == {3 * ALIGN: 0, 4 * ALIGN: 4 * ALIGN}
    for factor in (2.0, 3.0):
        master.start_step(1)
        assert "large" not in master.gradients
        assert all(
            flat.moves_gradients or not shard.gradient.untyped_storage().nbytes()
            for flat in master.flat
            for shard in flat.shards
        )
        (model["large"] * factor).sum().backward()
        assert model["large"].grad is None
        master.finish_gradients()
        assert torch.equal(master.gradients["large"], torch.full((3, ALIGN), factor).bfloat16())
        assert torch.equal(master.gradients["odd"], torch.zeros(3, ALIGN + 1).bfloat16())
        assert sorted(gradient.numel() for gradient in master.own_gradients()) == [3 * ALIGN, 4 * ALIGN]
    master.start_step(1)
    master.finish_gradients()
    assert torch.equal(master.gradients["large"], torch.zeros(3, ALIGN).bfloat16())
    master.start_step(2)
    with pytest.raises(AssertionError, match="large: its gradient is not moved"):
        model["large"].sum().backward()
