"""Norms, rotary angles and attention: the formula in any dtype, and at least float32 inside."""

import pytest
import torch
import torch.nn.functional as F

from pentode.ops.activation import ACTIVATIONS
from pentode.ops.attention import attention
from pentode.ops.norm import layer_norm, rms_norm
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
