"""Dropout by hash: one mask whatever the layout, the right rate, the right gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pentode.nn.dropout import Dropout
from pentode.ops.attention import attention, attention_with_dropout
from pentode.ops.dropout import DRAWS, dropout, keep_mask, token_keys

T, D = 27, 50


def keys(samples: int = 3, *, seed: int = 1) -> Tensor:
    return token_keys(torch.arange(samples), torch.arange(T // 3).repeat(samples), torch.tensor(seed))


def mask(p: float, on: Tensor, *, site: int = 1, features: int = 4096) -> Tensor:
    return keep_mask(p, keys=(on + site)[:, None], groups=torch.arange(-(-features // DRAWS)))[:, :features]


@given(
    t=st.tuples(st.integers(0, T), st.integers(0, T)).map(sorted),
    d=st.tuples(st.integers(0, D), st.integers(0, D)).map(sorted),
)
def test_any_cut_of_tokens_and_features_sees_its_part_of_the_same_mask(t: list[int], d: list[int]) -> None:
    x = torch.randn(T, D)
    whole = dropout(x, 0.3, keys=keys(), site=4)
    part = dropout(x[t[0] : t[1], d[0] : d[1]], 0.3, keys=keys()[t[0] : t[1]], site=4, feature_start=d[0])
    assert torch.equal(part, whole[t[0] : t[1], d[0] : d[1]])


def test_a_sample_s_mask_does_not_depend_on_the_micro_batch_around_it() -> None:
    alone = token_keys(torch.tensor([2]), torch.arange(T // 3), torch.tensor(1))
    assert torch.equal(alone, keys()[-(T // 3) :])


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_elements_are_kept_at_the_rate_asked_for_and_the_mean_stays(p: float) -> None:
    many = token_keys(torch.arange(64), torch.arange(64).repeat(64), torch.tensor(9))
    keep = mask(p, many, features=256)
    assert keep.float().mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / keep.numel()) ** 0.5 + 2**-16)
    assert dropout(torch.ones(4096, 256), p, keys=many, site=1).mean().item() == pytest.approx(1, abs=0.02)
    for dim in (0, 1):  # no token or feature of its own rate: each mean within 6 standard deviations
        spread = (keep.double().mean(dim) - (1 - p)).abs().max() / (p * (1 - p) / keep.shape[dim]) ** 0.5
        assert spread < 6


def test_masks_of_seeds_sites_tokens_and_neighbouring_features_are_unrelated() -> None:
    base = mask(0.5, keys())
    others = {
        "seed": mask(0.5, keys(seed=2)),
        "site": mask(0.5, keys(), site=2),
        "next token": base.roll(1, 0),
        "next feature": base.roll(1, 1),
        "next hash": base.roll(4, 1),
    }
    for name, other in others.items():
        assert (base == other).double().mean().item() == pytest.approx(0.5, abs=0.01), name


def test_the_gradient_is_the_mask_scaled() -> None:
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.25, keys=keys(), site=7)
    y.backward(torch.ones_like(y))
    keep = mask(0.25, keys(), site=7, features=D)
    torch.testing.assert_close(x.grad, keep.double() / 0.75)
    torch.testing.assert_close(y, x * keep / 0.75)


def test_nothing_is_dropped_at_rate_0_or_out_of_training() -> None:
    x = torch.randn(T, D)
    assert dropout(x, 0.0, keys=keys(), site=1) is x
    layer = Dropout(0.5, site=1, device=torch.device("cpu"))
    assert layer.eval()(x, None) is x
    assert not torch.equal(layer.train()(x, keys()), x)


def test_dropout_on_attention_hits_probabilities_and_is_the_same_for_a_part_of_the_heads() -> None:
    q, k, v = (torch.randn(3, 9, h, 6, dtype=torch.float64) for h in (4, 2, 2))
    on = {"keys": keys(), "site": torch.tensor(3)}
    torch.testing.assert_close(attention_with_dropout(q, k, v, p=0.0, **on), attention(q, k, v))
    whole = attention_with_dropout(q, k, v, p=0.4, **on)
    half = attention_with_dropout(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], p=0.4, **on, head_start=2)
    torch.testing.assert_close(half, whole[:, :, 2:])
    many = [attention_with_dropout(q, k, v, p=0.4, keys=keys(), site=torch.tensor(s)) for s in range(400)]
    torch.testing.assert_close(torch.stack(many).mean(0), attention(q, k, v), atol=0.3, rtol=0)
