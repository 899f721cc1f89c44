"""The passes of the cross-entropy to be compiled are the plain ones, compiled or not, and both are torch's own."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pentode.ops import fused_products
from pentode.ops.cross_entropy import PLAIN, TO_COMPILE, Passes
from tests.helpers.fused import PLAIN as PACKAGE_IN_PLAIN

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def inputs(
    n: int, rows: int, held: int, *, dtype: torch.dtype, seed: int = 0, large: float = 5.0
) -> tuple[Tensor, ...]:
    """Logits with `rows - held` columns of padding, the log of each row's total, and of each row what to subtract.

    Every third row has no label; every third from the second on has its label on another rank.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = (large * torch.randn(n, rows, generator=generator, dtype=torch.float64)).to(dtype)
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    log_total = wide[:, :held].logsumexp(1) + 0.1
    valid, here = torch.arange(n) % 3 != 0, torch.arange(n) % 3 == 2
    factor = 1.3 * valid.to(wide.dtype)
    row = torch.randint(held, (n,), generator=generator) * here
    return logits, log_total, factor, here.to(wide.dtype), row


def gradient(passes: Passes, held: int, given: tuple[Tensor, ...]) -> Tensor:
    logits, *others = given
    changed = logits.clone()
    passes.gradient_(changed, held, *others)
    return changed


def check(passes: Passes, *, n: int, rows: int, held: int, dtype: torch.dtype) -> None:
    given = inputs(n, rows, held, dtype=dtype)
    logits, log_total, factor, hot, row = given
    for got, want in zip(passes.statistics(logits, held), PLAIN.statistics(logits, held), strict=True):
        assert got.dtype == want.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(got, want)
    got, want = gradient(passes, held, given), gradient(PLAIN, held, given)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want)
    assert not got[:, held:].any()
    assert not got[factor == 0].any()
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    spelled_out = (wide - log_total[:, None]).exp() * factor[:, None]
    spelled_out[:, held:] = 0
    spelled_out[torch.arange(n), row] -= hot
    torch.testing.assert_close(got, spelled_out.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("passes", [PLAIN, TO_COMPILE], ids=["plain", "to compile"])
@given(n=st.integers(1, 9), held=st.integers(1, 20), padding=st.integers(0, 12))
def test_gradients_are_the_softmax_less_the_label(
    passes: Passes, dtype: torch.dtype, n: int, held: int, padding: int
) -> None:
    check(passes, n=n, rows=held + padding, held=held, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_those_of_the_true_vocabulary(dtype: torch.dtype) -> None:
    logits = inputs(7, 24, 19, dtype=dtype)[0]
    logits[:, 19:] = torch.inf  # whatever stands in the padding
    top, total = PLAIN.statistics(logits, 19)
    torch.testing.assert_close(top + total.log(), logits[:, :19].to(top.dtype).logsumexp(1))


@pytest.mark.parametrize("passes", [PLAIN, TO_COMPILE], ids=["plain", "to compile"])
def test_what_stands_in_the_padding_is_no_gradient(passes: Passes) -> None:
    logits, *others = inputs(7, 24, 19, dtype=torch.float32)
    for anything in (torch.inf, torch.nan, 1e30):
        logits[:, 19:] = anything
        got = gradient(passes, 19, (logits, *others))
        assert torch.isfinite(got).all()
        assert not got[:, 19:].any()


@pytest.mark.long  # the compiler takes half a minute
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_passes_are_the_plain_ones(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    compiled = Passes(*(torch.compile(one, fullgraph=True) for one in TO_COMPILE))
    for n, rows, held in ((6, 32, 32), (6, 32, 23), (9, 32, 23)):
        check(compiled, n=n, rows=rows, held=held, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_products_are_added_up_in_float32_and_rounded_once(dtype: torch.dtype, add: bool, compiled: bool) -> None:
    total_ = torch.compile(TO_COMPILE.total_, fullgraph=True) if compiled else PLAIN.total_
    wide = torch.promote_types(dtype, torch.float32)
    products = [torch.randn(7, 5).to(dtype) for _ in range(3)]
    got = torch.randn(7, 5).to(dtype) if add else torch.full((7, 5), torch.nan, dtype=dtype)
    scale = torch.tensor(0.3, dtype=wide)
    want = torch.stack(products).to(wide).sum(dim=0) * scale
    want = (want + got if add else want).to(dtype)
    total_(products, scale, got, add)
    torch.testing.assert_close(
        got, want, rtol=0 if dtype == torch.bfloat16 else None, atol=0 if dtype == torch.bfloat16 else None
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "held"), [(50304, 50257), (4096, 4096), (40, 7)])
def test_the_kernel_has_the_plain_statistics(kernels: torch.device, rows: int, held: int, dtype: torch.dtype) -> None:
    from pentode.ops.cross_entropy_kernel import statistics

    logits = inputs(9, rows, held, dtype=dtype)[0].to(kernels)
    for got, want in zip(statistics(logits, held), PLAIN.statistics(logits, held), strict=True):
        torch.testing.assert_close(got, want)
    logits[3, held // 2] = torch.nan
    assert statistics(logits, held)[1].isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "held"), [(8200, 8193), (4096, 4096), (40, 7)])
def test_the_kernel_does_both_passes_as_the_plain_ones_would(
    kernels: torch.device, rows: int, held: int, z_loss: float, dtype: torch.dtype
) -> None:
    from pentode.ops.cross_entropy_kernel import whole_

    n = 1 + 2 * torch.cuda.get_device_properties(kernels).multi_processor_count if kernels.type == "cuda" else 17
    logits, *_, row = (t.to(kernels) for t in inputs(n, rows, held, dtype=dtype))  # one more than there are programs
    weight = (torch.arange(n, device=kernels) % 3 != 0).float()
    labels = row.where(weight > 0, -100)
    top, total = PLAIN.statistics(logits, held)
    want_log = total.log() + top
    want, got = logits.clone(), logits.clone()
    PLAIN.gradient_(want, held, want_log, weight * (1 + 2 * z_loss * want_log), weight, row)
    torch.testing.assert_close(whole_(got, held, labels, -100, z_loss), want_log)
    torch.testing.assert_close(got, want)
    logits[3, held // 2] = torch.nan
    assert whole_(logits, held, labels, -100, z_loss).isnan().nonzero().flatten().tolist() == [3]


def test_the_package_makes_a_long_row_s_gradient_unless_part_of_it_is_padding(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU with quack-kernels, by it; elsewhere by what the tests have in its place."""
    from pentode.ops.cross_entropy_kernel import whole_

    calls: list[int] = []
    device = torch.zeros(0, device=kernels).device
    real = device.type == "cuda"
    if real and not fused_products.PACKAGE.is_usable(device):
        pytest.skip("quack-kernels is not installed, or not for this GPU")
    functions = fused_products.PACKAGE.on(device) if real else PACKAGE_IN_PLAIN

    def cross_entropy(*arguments: Any) -> None:
        calls.append(1)
        functions.cross_entropy(*arguments)

    monkeypatch.setitem(fused_products.PACKAGE.loaded, device.index, functions._replace(cross_entropy=cross_entropy))
    n, V = 9, fused_products.LONG + 8
    logits, *_, row = (t.to(device) for t in inputs(n, V, V, dtype=torch.bfloat16))
    labels = row.where(torch.arange(n, device=device) % 3 != 0, -100)
    for held, z_loss, called in ((V, 0.0, 1), (V - 3, 0.0, 0), (V, 0.1, 0)):
        want, got = logits.clone(), logits.clone()
        want_log = PLAIN.statistics(logits, held)[1].log() + PLAIN.statistics(logits, held)[0]
        weight = (labels >= 0).float()
        PLAIN.gradient_(want, held, want_log, weight * (1 + 2 * z_loss * want_log), weight, row)
        calls.clear()
        torch.testing.assert_close(whole_(got, held, labels, -100, z_loss), want_log)
        torch.testing.assert_close(got, want)
        assert len(calls) == called
    logits[4, 5] = torch.nan
    assert whole_(logits, V, labels, -100, 0.0).isnan().nonzero().flatten().tolist() == [4]
    assert logits.isnan().any(dim=1).nonzero().flatten().tolist() == [4]
