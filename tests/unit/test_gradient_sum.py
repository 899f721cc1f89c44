"""Operators that add to a weight's sum, beside autograd's own gradients of the same weight, micro-batch after batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pentode import device as devices
from pentode.dist.mesh import Axis
from pentode.ops.embedding import _add_rows_, embedding
from pentode.ops.gradient_sum import put_beside, sum_of
from pentode.optim import master as master_module
from pentode.optim.groups import Group
from pentode.optim.master import MasterWeights
from pentode.parallel.spec import ParamSpec, parameter

V, D = 7, 5
ROWS = torch.tensor([3, 0, 3, 6, 3])


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(master_module, "TOGETHER", V * D - 1)


def table(dtype: torch.dtype = torch.float64) -> nn.Parameter:
    made = parameter(ParamSpec((V, D)), device=torch.device("cpu"), dtype=dtype)
    nn.init.normal_(made, generator=torch.Generator().manual_seed(0))
    return made


def master_of(weight: nn.Parameter, *, accumulate_in: torch.dtype = torch.float32) -> MasterWeights:
    return MasterWeights(
        {"w": weight},
        groups=[Group(("w",), 0.0)],
        data=Axis("data"),
        bucket_bytes=1 << 20,
        accumulate_in=accumulate_in,
    )


def used(weight: Tensor, how: str) -> Tensor:
    """What depends on a weight: by an operator that adds to its sum, by others, or by both."""
    y = torch.zeros((), dtype=weight.dtype)
    if how in ("sum", "both", "sum twice"):
        y = y + embedding(ROWS, weight).square().sum()
    if how == "sum twice":
        y = y + embedding(ROWS.flip(0) // 2, weight).sin().sum()
    if how in ("autograd", "both"):
        y = y + (weight.exp() * torch.arange(D)).sum()
    return y


def step(master: MasterWeights, weight: nn.Parameter, micro_batches: list[str]) -> Tensor:
    """The gradient of a step."""
    master.start_step(len(micro_batches))
    for how in micro_batches:
        used(weight, how).backward()
        assert weight.grad is None
    master.finish_gradients()
    return master.gradients["w"].clone()


@pytest.mark.parametrize(
    "micro_batches",
    [
        ["sum"],
        ["both"],
        ["sum twice", "sum"],
        ["autograd", "sum"],
        ["sum", "autograd", "both"],
        ["both", "sum twice", "autograd"],
    ],
    ids=str,
)
def test_a_steps_gradient_is_autograds_whoever_makes_it(micro_batches: list[str]) -> None:
    weight, plain = table(), table()
    master = master_of(weight)
    assert sum_of(weight) is not None
    assert sum_of(plain) is None
    (want,) = torch.autograd.grad(sum((used(plain, how) for how in micro_batches), torch.zeros(())), plain)
    for _ in range(2):  # nothing of a step is left in the next
        torch.testing.assert_close(step(master, weight, micro_batches), want)


def test_the_losss_scale_is_known_within_a_step_alone() -> None:
    weight, scale = table(), torch.ones(())
    master, found = master_of(weight), sum_of(weight)
    assert found is not None
    master.start_step(1, loss_scale=scale)
    assert found.loss_scale is scale
    master.finish_gradients()
    assert found.loss_scale is None


def test_a_step_that_nothing_adds_to_has_zeros() -> None:
    weight = table()
    master = master_of(weight)
    assert step(master, weight, ["both"]).any()
    master.start_step(1)
    master.finish_gradients()
    assert not master.gradients["w"].any()
    assert master.missing() == ["w"]
    master.start_step(2)
    used(weight, "sum").backward()
    master.finish_gradients()  # of two micro-batches only one has come
    plain = table()
    (want,) = torch.autograd.grad(used(plain, "sum"), plain)
    torch.testing.assert_close(master.gradients["w"], want)


def test_small_weights_and_narrow_sums_are_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = table(torch.bfloat16)
    master = master_of(narrow, accumulate_in=torch.bfloat16)
    assert sum_of(narrow) is None, "in bfloat16, parts would be rounded one by one"
    master.start_step(2)
    used(narrow, "both").backward()
    assert master.gradients["w"].any(), "so large a gradient does not wait for others"
    wide = table(torch.bfloat16)
    master = master_of(wide)
    assert sum_of(wide) is not None
    monkeypatch.setattr(master_module, "TOGETHER", V * D)
    small = table()
    master_of(small)
    assert sum_of(small) is None
    assert step(master, wide, ["sum", "both"]).dtype == torch.float32


@given(rows=st.lists(st.integers(0, V - 1), min_size=1, max_size=3 * V))
def test_rows_are_added_on_a_gpu_as_on_a_cpu(rows: list[int]) -> None:
    total = torch.arange(V * D, dtype=torch.float64).view(V, D)
    generator = torch.Generator().manual_seed(0)
    named, grad = torch.tensor(rows), torch.randn(len(rows), D, dtype=torch.float64, generator=generator)
    want = total.index_add(0, named, grad)
    _add_rows_(total, named, grad)
    torch.testing.assert_close(total, want)


@pytest.mark.parametrize(
    ("T", "named", "D"), [(1, 5, 3), (9, 1, 3), (40, 5, 1030), (40, 1, 8), (16, 2, 40), (33, 1000, 1024)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_kernel_adds_rows(kernels: torch.device, T: int, named: int, D: int, dtype: torch.dtype) -> None:
    from pentode.ops.embedding_kernel import add_rows_

    total, grad = torch.randn(1001, D, device=kernels), torch.randn(T, D, device=kernels).to(dtype)
    rows = torch.randint(named, (T,), device=kernels) + 1
    want = total.double().index_add(0, rows, grad.double())
    add_rows_(total, rows, grad)
    torch.testing.assert_close(total.double(), want, rtol=1e-6, atol=3e-6)


def test_who_adds_rows_is_chosen_in_forward(kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from pentode.ops import embedding_kernel

    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(embedding_kernel, "add_rows_", lambda total, rows, grad: calls.append(tuple(grad.shape)))
    weight = table(torch.float32).detach().to(kernels).requires_grad_()
    found, rows = put_beside(weight, torch.zeros_like(weight)), ROWS.to(kernels)
    with devices.without_kernels():
        y = embedding(rows, weight)
    y.sum().backward()  # outside: autograd's thread does not know it either
    assert calls == []
    assert found.total.sum() == ROWS.numel() * D
    embedding(rows, weight).sum().backward()
    assert calls == [(ROWS.numel(), D)]


@pytest.mark.gpu
@pytest.mark.parametrize("by", ["torch", "kernel"])
@pytest.mark.parametrize(("T", "named", "size"), [(16_384, 1, 50_000), (16_384, 300, 300), (9_000, 50_000, 50_000)])
@pytest.mark.parametrize("T_of", [1, 8])
def test_rows_are_added_with_the_same_bits_each_time(T: int, named: int, size: int, T_of: int, by: str) -> None:
    from pentode.ops.embedding_kernel import add_rows_

    add = add_rows_ if by == "kernel" else _add_rows_
    generator = torch.Generator("cuda").manual_seed(0)
    rows = torch.randint(named, (T // T_of,), generator=generator, device="cuda")
    grad = torch.randn(T // T_of, 256, generator=generator, device="cuda").bfloat16()
    first, second = (torch.zeros(size, 256, device="cuda") for _ in range(2))
    for total in (first, second):
        add(total, rows, grad)
    assert torch.equal(first, second)
    want = torch.zeros(size, 256, dtype=torch.float64).index_add(0, rows.cpu(), grad.cpu().double())
    assert (first.cpu() - want).norm() < 1e-5 * want.norm()
