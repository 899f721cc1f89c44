"""Norms, rotary angles and attention: the formula in any dtype, and at least float32 inside."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pentode.ops import norm as norms
from pentode.ops.activation import ACTIVATIONS
from pentode.ops.attention import attention
from pentode.ops.norm import beside_norm, layer_norm, norm_backward, rms_norm
from pentode.ops.rope import angles, frequencies, rotate, scale_llama3

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_compute_in_at_least_float32_and_round_once(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((1000, 96), (96,), (96,)))
    wide = torch.promote_types(dtype, torch.float32)
    a, w, b = x.to(wide), weight.to(wide), bias.to(wide)
    rms = F.rms_norm(a, (96,), w, 1e-5)
    assert torch.equal(rms_norm(x, weight, 1e-5), rms.to(dtype))
    torch.testing.assert_close(rms, a / (a.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w)
    got = layer_norm(x, weight, bias, 1e-5)
    centred = a - a.mean(-1, keepdim=True)
    torch.testing.assert_close(
        got, (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w + b).to(dtype)
    )
    assert torch.equal(got, F.layer_norm(a, (96,), w, b, 1e-5).to(dtype))


def norm_operands(tokens: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """The gradients of a stream and of its norm, the stream, [T, D]; weight and bias, [D]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, width)] * 3 + [(width,)] * 2
    return [(torch.randn(shape, generator=generator) + (i == 2)).to(dtype) for i, shape in enumerate(shapes)]


def gradients_beside(stream: Tensor, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The gradients of x, weight and bias, by autograd, where `stream` and `grad` are those of x and its norm."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = rms_norm(*leaves, 1e-5) if bias is None else layer_norm(*leaves, 1e-5)
    found = torch.autograd.grad([leaves[0], y], leaves, [stream, grad])
    return list(found)


@pytest.mark.parametrize("biased", [False, True])
def test_the_backward_of_a_norm_beside_its_stream_is_the_derivative(biased: bool) -> None:
    _, _, x, weight, bias = (t.requires_grad_() for t in norm_operands(5, 6, torch.float64))
    assert torch.autograd.gradcheck(norms._BesideNorm.apply, (x, weight, bias if biased else None, 1e-5))
    for same, made in zip(
        beside_norm(x, weight, bias if biased else None, 1e-5),
        norms._BesideNorm.apply(x, weight, bias if biased else None, 1e-5),
        strict=True,
    ):
        assert torch.equal(same, made)


@pytest.mark.parametrize("centred", [False, True])
def test_it_is_an_operator_that_compiles(centred: bool) -> None:
    operands = (*norm_operands(5, 6, torch.float32)[:4], 1e-5, centred)
    torch.library.opcheck(norm_backward, operands, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("centred", [False, True])
def test_the_plain_backward_computes_in_float32_and_rounds_once(centred: bool) -> None:
    operands = norm_operands(300, 96, torch.bfloat16)[:4]
    found = norm_backward(*operands, 1e-5, centred)
    exact = norm_backward(*(t.float() for t in operands), 1e-5, centred)
    for ours, wide in zip(found, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, wide.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_a_compiled_norm_beside_its_stream_has_the_gradients_of_a_plain_one(biased: bool, dtype: torch.dtype) -> None:
    stream, grad, x, weight, bias = norm_operands(7, 16, dtype)
    kept = bias if biased else None

    def block(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, normed = norms._BesideNorm.apply(x, weight, bias, 1e-5)
        return x * stream + normed * grad

    leaves = [t.clone().requires_grad_() for t in (x, weight, kept) if t is not None]
    compiled = torch.compile(block, fullgraph=True)(*leaves, *([] if biased else [None]))
    found = torch.autograd.grad(compiled.sum(), leaves)
    for ours, plain in zip(found, gradients_beside(stream, grad, x, weight, kept), strict=True):
        # bfloat16: the plain form rounds the norm's part and the stream's before it adds them
        torch.testing.assert_close(ours, plain, **({"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}))


MANY = [(5000, 768), (300, 2048), (2000, 4096), (64, 8192), (3, 100)]  # tokens and features, on a GPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("tokens", "width"), MANY if torch.cuda.is_available() else [(30, 768), (7, 8192), (3, 100)])
def test_the_kernel_of_a_norm_is_the_plain_form(
    kernels: torch.device, tokens: int, width: int, centred: bool, dtype: torch.dtype
) -> None:
    operands = [t.to(kernels) for t in norm_operands(tokens, width, dtype)[:4]]
    got = norm_backward(*operands, 1e-5, centred)
    wide = [t.cpu().double() for t in operands]
    for ours, exact in zip(got, norm_backward(*wide, 1e-5, centred), strict=True):
        assert ours.shape == exact.shape
        # bfloat16: half a unit of its last place, 2^-9, and of the largest sums; float32: sums of thousands of products
        close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-3}
        torch.testing.assert_close(ours.cpu().double(), exact, **close)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_products_depend_on_distance_alone(dtype: torch.dtype, interleaved: bool) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    speed = frequencies(8, theta=100.0, dtype=wide)
    q, k = torch.randn(2, 1, 1, 8).to(dtype).expand(2, 6, 1, 8)
    positions = torch.tensor([0, 1, 2, 100, 101, 102])
    turned = [rotate(x, *angles(positions, speed), interleaved=interleaved) for x in (q, k)]
    assert all(x.dtype == dtype for x in turned)
    near, far = ((turned[0][i : i + 3, 0] @ turned[1][i : i + 3, 0].T) for i in (0, 3))
    # bfloat16 rounds each of the 8 features of both sides to 8 bits
    torch.testing.assert_close(near, far, **({"atol": 0.1, "rtol": 0.05} if dtype == torch.bfloat16 else {}))
    assert torch.equal(turned[0][0], q[0])


def test_bfloat16_keeps_its_positions_apart() -> None:
    speed = frequencies(8, theta=10000.0, dtype=torch.promote_types(torch.bfloat16, torch.float32))
    x = torch.randn(2, 1, 8, dtype=torch.bfloat16)
    got = rotate(x, *angles(torch.tensor([4095, 4096]), speed))
    want = rotate(x.double(), *angles(torch.tensor([4095, 4096]), speed.double()))
    torch.testing.assert_close(got, want.bfloat16(), atol=0.02, rtol=0.02)


def test_llama3_scaling_stretches_slow_waves_only() -> None:
    plain = frequencies(64, theta=500000.0, dtype=torch.float64)
    scaled = scale_llama3(plain, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192)
    wavelength = 2 * torch.pi / plain
    assert torch.equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    torch.testing.assert_close(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength >= 8192 / 4) & (wavelength <= 8192)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 7), (3, 7), (1, 1)])
def test_attention_is_its_formula(queries: int, keys: int, kv_heads: int) -> None:
    q = torch.randn(2, queries, 4, 5, dtype=torch.float64)
    k, v = torch.randn(2, 2, keys, kv_heads, 5, dtype=torch.float64)
    want = torch.empty_like(q)
    for b in range(2):
        for s in range(queries):
            seen = keys - queries + s + 1
            for h in range(4):
                kv = h * kv_heads // 4
                weights = (k[b, :seen, kv] @ q[b, s, h] / 5**0.5).softmax(0)
                want[b, s, h] = weights @ v[b, :seen, kv]
    torch.testing.assert_close(attention(q, k, v), want)


def test_the_tanh_gelu_is_gpt_2_s_formula() -> None:
    x = torch.randn(100, dtype=torch.float64)
    want = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    torch.testing.assert_close(ACTIVATIONS["gelu_new"](x), want)
