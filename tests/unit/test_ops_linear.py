"""Linear layers in float8: the products of what is quantised, and gradients near those of bfloat16."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pentode.ops import linear as linears
from pentode.ops.activation import gated
from pentode.ops.float8 import E4M3, E5M2, cast_both_ways, scaled, scaled_both_ways
from pentode.ops.linear import Float8, gated_linear, linear

T, K, N = 64, 48, 32
RECIPES: list[Float8] = ["tensorwise", "rowwise"]


def operands(*, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and a gradient in bfloat16; rows of x that differ in size by up to 10^spread."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in ((T, K), (N, K), (T, N)))
    x *= torch.logspace(0, -spread, T)[:, None]
    return x.bfloat16().requires_grad_(), (weight / 7).bfloat16().requires_grad_(), (grad / 1000).bfloat16()


def quantised(x: Tensor, dtype: torch.dtype, *, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """x in float8, and what to multiply it by: one scale, or one a slice of `dim`."""
    if dim is not None:
        return scaled(x, dtype, dim=dim)
    rowwise, columnwise, scale = scaled_both_ways(x, dtype)
    assert rowwise.is_contiguous()
    assert columnwise.is_contiguous()
    assert torch.equal(rowwise.t().float(), columnwise.float())
    return rowwise, scale


def error(got: Tensor, want: Tensor) -> float:
    """The difference's norm over the norm."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_quantised_numbers_fill_the_range_and_scale_back(dtype: torch.dtype, dim: int | None) -> None:
    x = operands()[0].detach()
    x8, scale = quantised(x, dtype, dim=dim)
    largest = x8.float().abs().amax() if dim is None else x8.float().abs().amax(dim)
    torch.testing.assert_close(largest, torch.full_like(largest, torch.finfo(dtype).max))
    steps = 2.0 ** -(4 if dtype == E4M3 else 3)  # half a unit of the last place
    smallest = torch.finfo(dtype).smallest_normal * scale
    close = (x8.float() * scale - x.float()).abs() <= steps * torch.maximum(x.float().abs(), smallest.expand_as(x))
    assert close.all()


def test_zeros_stay_zeros() -> None:
    x8, scale = quantised(torch.zeros(4, 4).bfloat16(), E4M3)
    assert not (x8.float() * scale).any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_is_the_product_of_the_quantised_operands(recipe: Float8) -> None:
    x, weight, _ = (t.detach() for t in operands())
    dim = None if recipe == "tensorwise" else 1
    (x8, x_scale), (w8, w_scale) = quantised(x, E4M3, dim=dim), quantised(weight, E4M3, dim=dim)
    want = (x8.double() * x_scale) @ (w8.double() * w_scale).T
    torch.testing.assert_close(linear(x, weight, float8=recipe), want.bfloat16(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_near_those_of_bfloat16(recipe: Float8, bias: bool) -> None:
    x, weight, grad = operands()
    b = torch.ones(N, dtype=torch.bfloat16, requires_grad=True) if bias else None
    leaves = [x, weight] if b is None else [x, weight, b]
    want = linear(x, weight, b)
    want_grads = torch.autograd.grad(want, leaves, grad)
    got = linear(x, weight, b, float8=recipe)
    got_grads = torch.autograd.grad(got, leaves, grad)
    assert got.dtype == torch.bfloat16
    assert error(got, want) < 0.05
    for ours, theirs in zip(got_grads, want_grads, strict=True):
        assert ours.dtype == theirs.dtype
        assert error(ours, theirs) < 0.08


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gated_layer_is_the_layer_and_its_gate(recipe: Float8) -> None:
    x, weight, grad = operands()
    forms = [gated_linear(x, weight, "silu", float8=recipe), gated(linear(x, weight, float8=recipe), "silu")]
    if recipe == "tensorwise":
        forms.append(linears._TensorwiseSwiGLU.apply(x, weight))  # as on a GPU
    got, *others = [(y, *torch.autograd.grad(y, [x, weight], grad[:, : N // 2])) for y in forms]
    assert not torch.equal(got[0], gated(linear(x, weight), "silu")), "nothing was multiplied in float8"
    for other in others:
        torch.testing.assert_close(got[0], other[0])
        # gradients differ in bfloat16's last bit, and one that falls on E5M2's other side differs by an eighth
        assert all(error(ours, theirs) < 0.03 for ours, theirs in zip(got, other, strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gated_layer_has_the_activation_that_it_is_given(recipe: Float8) -> None:
    x, weight, _ = operands()
    got, silu = (gated_linear(x, weight, name, float8=recipe) for name in ("gelu", "silu"))
    torch.testing.assert_close(got, gated(linear(x, weight, float8=recipe), "gelu"))
    assert error(got, silu) > 0.1


def test_on_a_gpu_a_gated_layer_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = operands()
    monkeypatch.setattr(linears, "devices", SimpleNamespace(is_gpu=lambda _: True))
    kinds = {
        (name, recipe): type(gated_linear(x, weight, name, float8=recipe).grad_fn).__name__
        for name in ("gelu", "silu")
        for recipe in RECIPES
    }
    fused = {key for key, kind in kinds.items() if kind == "_TensorwiseSwiGLUBackward"}
    assert fused == {("silu", "tensorwise")}


def test_rows_of_other_sizes_keep_their_digits_where_each_has_a_scale() -> None:
    x, weight, _ = (t.detach() for t in operands(spread=6))
    want = linear(x, weight)[-8:]  # the smallest rows
    rowwise, tensorwise = (error(linear(x, weight, float8=recipe)[-8:], want) for recipe in ("rowwise", "tensorwise"))
    assert rowwise < 0.05 < 0.5 < tensorwise


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(128, 64), (1040, 336), (16, 4096)])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_kernel_casts_as_the_plain_form_does(rows: int, columns: int, gradient: bool) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    scale = torch.tensor(123.4)
    want, got = cast_both_ways(x, scale, gradient), cast_both_ways(x.cuda(), scale.cuda(), gradient)
    for ours, plain in zip(got, want, strict=True):
        assert ours.is_contiguous()
        assert torch.equal(ours.cpu().view(torch.uint8), plain.view(torch.uint8))


def test_the_cast_is_an_operator_that_compiles() -> None:
    x = operands()[0].detach()
    torch.library.opcheck(cast_both_ways, (x, torch.tensor(3.0), False), test_utils=("test_schema", "test_faketensor"))
