"""The sliced linear and cross-entropy: torch's own numbers, whatever the slices, dtype and padding."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pentode.dist.mesh import Axis
from pentode.ops.gradient_sum import put_beside
from pentode.parallel import loss as loss_module
from pentode.parallel.batch import IGNORE
from pentode.parallel.loss import Vocab, vocab_logits, vocab_loss
from tests.helpers import fused

T, D, V = 50, 12, 23
ONE = Vocab(V, Axis("tp"))


def inputs(dtype: torch.dtype = torch.float64, *, rows: int = V) -> tuple[Tensor, Tensor, Tensor]:
    x = (3 * torch.randn(T, D)).to(dtype).requires_grad_()
    weight = torch.randn(rows, D).to(dtype)
    weight[V:] = 0
    labels = torch.randint(V, (T,))
    labels[::4] = IGNORE
    return x, weight.requires_grad_(), labels


def reference(x: Tensor, weight: Tensor, labels: Tensor, *, z_loss: float = 0.0) -> Tensor:
    logits = x @ weight[:V].T
    z = (logits.logsumexp(-1).square() * (labels != IGNORE)).sum()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") + z_loss * z


@pytest.mark.parametrize("slice_bytes", [1, 8 * V * 7, 1 << 30], ids=["a token each", "7 tokens", "one slice"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("rows", [V, 32])
def test_loss_and_gradients_are_cross_entropy_s(
    monkeypatch: pytest.MonkeyPatch, slice_bytes: int, z_loss: float, rows: int
) -> None:
    monkeypatch.setattr(loss_module, "SLICE_BYTES", slice_bytes)
    x, weight, labels = inputs(rows=rows)
    want = reference(x, weight, labels, z_loss=z_loss)
    want_grads = torch.autograd.grad(want / 7, (x, weight))
    got = vocab_loss(x, weight, labels, vocab=ONE, z_loss=z_loss)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got / 7, (x, weight)), want_grads)
    with torch.no_grad():
        torch.testing.assert_close(vocab_loss(x, weight, labels, vocab=ONE, z_loss=z_loss), want)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("rows", [V, 32])
def test_the_kernels_loss_and_gradients_are_cross_entropy_s(kernels: torch.device, z_loss: float, rows: int) -> None:
    from pentode.ops.cross_entropy_kernel import PASSES

    leaves = inputs(torch.float32, rows=rows)
    want = reference(*leaves, z_loss=z_loss)
    want_grads = torch.autograd.grad(want, leaves[:2])
    x, weight, labels = (t.detach().to(kernels) for t in leaves)
    x.requires_grad_(), weight.requires_grad_()
    got = vocab_loss(x, weight, labels, vocab=ONE._replace(passes=PASSES), z_loss=z_loss)
    torch.testing.assert_close(got.cpu(), want)
    for grad, right in zip(torch.autograd.grad(got, (x, weight)), want_grads, strict=True):
        torch.testing.assert_close(grad.cpu(), right, rtol=1e-4, atol=1e-4)


def test_slices_cover_all_tokens_evenly_within_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "SLICE_BYTES", 1000)
    for tokens, each, count in ((1, 8, 1), (50, 184, 10), (1000, 10, 11), (7, 5000, 7), (90, 40, 4)):
        slices = loss_module._slices(tokens, each)
        assert [i for part in slices for i in range(tokens)[part]] == list(range(tokens))
        longest = max(part.stop - part.start for part in slices)
        assert longest * each <= max(1000, each)
        assert len(slices) == count, "more slices than needed"
        if 8 * each <= 1000:  # products of the package's take multiples of 8
            assert all((part.stop - part.start) % 8 == 0 for part in slices[:-1])


@pytest.mark.parametrize("slice_bytes", [200, 1 << 20])
def test_the_weights_gradient_is_added_to_its_sum(monkeypatch: pytest.MonkeyPatch, slice_bytes: int) -> None:
    monkeypatch.setattr(loss_module, "SLICE_BYTES", slice_bytes)
    x, weight, labels = inputs()
    (want,) = torch.autograd.grad(reference(x, weight, labels), weight)
    total = put_beside(weight, torch.full_like(weight, torch.nan)).total
    for factor in (0.5, 0.25):
        (vocab_loss(x, weight, labels, vocab=ONE) * factor).backward()
    assert weight.grad is None
    torch.testing.assert_close(total, 0.75 * want)


@pytest.mark.parametrize("slice_bytes", [200, 1 << 20])
def test_it_is_added_in_forward_where_the_losss_gradient_is_known(
    monkeypatch: pytest.MonkeyPatch, slice_bytes: int
) -> None:
    monkeypatch.setattr(loss_module, "SLICE_BYTES", slice_bytes)
    x, weight, labels = inputs()
    want_x, want = torch.autograd.grad(reference(x, weight, labels), (x, weight))
    found = put_beside(weight, torch.full_like(weight, torch.nan))
    scale = torch.tensor(0.25, dtype=torch.float64)
    calls: list[str] = []
    with fused.served(calls):
        found.start_step(scale)
        losses = [vocab_loss(x, weight, labels, vocab=ONE) * scale for _ in range(2)]  # as a pipeline may have them
        torch.testing.assert_close(found.total, 0.5 * want)
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(found.total, 0.5 * want)
        assert {"product scaled", "product scaled added"} == set(calls) - {"tiles"}
        each_time = len(loss_module._slices(T, 8 * V))
        assert calls.count("product scaled added") == 2 * each_time - 1
        found.finish_step()
        vocab_loss(x, weight, labels, vocab=ONE)
        torch.testing.assert_close(found.total, 0.5 * want)
        found.start_step(None)
        vocab_loss(x, weight, labels, vocab=ONE).backward()
    torch.testing.assert_close(found.total, want)
    assert weight.grad is None
    torch.testing.assert_close(x.grad, 1.5 * want_x)


def test_large_logits_overflow_nothing() -> None:
    x, weight, labels = inputs(torch.float32)
    got = vocab_loss(x * 1000, weight * 10, labels, vocab=ONE)
    torch.testing.assert_close(got, reference(x * 1000, weight * 10, labels))
    assert torch.isfinite(got)


def test_no_valid_label_gives_zero_loss_and_gradients() -> None:
    x, weight, labels = inputs()
    loss = vocab_loss(x, weight, torch.full_like(labels, IGNORE), vocab=ONE)
    loss.backward()
    assert (loss.item(), x.grad.abs().max().item(), weight.grad.abs().max().item()) == (0, 0, 0)


def test_bfloat16_logits_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, labels = inputs(torch.bfloat16)
    got = vocab_loss(x, weight, labels, vocab=ONE)
    assert got.dtype == torch.float32
    logits = (x @ weight.T).float()
    want = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(got, want)
    want_grads = torch.autograd.grad(want / 30, (x, weight))
    # The gradient of the logits is rounded to bfloat16 (8 bits), then summed over up to 50 tokens.
    torch.testing.assert_close(torch.autograd.grad(got / 30, (x, weight)), want_grads, atol=0.02, rtol=0.02)


def test_logits_leave_out_the_padding() -> None:
    x, weight, _ = inputs(rows=32)
    assert torch.equal(vocab_logits(x, weight, vocab=ONE), (x @ weight.T)[:, :V])
