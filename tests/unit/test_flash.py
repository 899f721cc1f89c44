"""FlashAttention-4 does the attention that it is faster for, where it is installed; elsewhere torch does."""

import importlib.metadata
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pentode import device as devices
from pentode.ops import flash
from pentode.ops.attention import attention

SHAPE = {"B": 2, "S": 64, "H": 4, "K": 2, "E": 32}
NUMBERS = 2 * 4 * 64 * 64 * 32


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What a package in the real one's place is asked, on what passes for a GPU of Hopper's generation."""
    calls: list[dict[str, Any]] = []
    flash._function.cache_clear()

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
        calls.append(options)
        heads = q.shape[2] // k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(heads, 2), v.repeat_interleave(heads, 2)))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None

    package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    cute.flash_attn_func = flash_attn_func  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4")
    monkeypatch.setattr(devices, "is_gpu", lambda device: True)
    monkeypatch.setattr(devices, "generation", lambda device: 9)
    monkeypatch.setattr(flash, "LARGE", NUMBERS)
    monkeypatch.delenv(flash.KEEP, raising=False)
    yield calls
    flash._function.cache_clear()


def drawn(dtype: torch.dtype = torch.bfloat16, *, N: int | None = None, **changes: int) -> list[Tensor]:
    """q, k and v."""
    B, S, H, K, E = (SHAPE | changes).values()
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, S, H, E), (B, N or S, K, E), (B, N or S, K, E))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def test_it_does_what_is_large(asked: list[dict[str, Any]]) -> None:
    q, k, v = drawn()
    want = attention(q.float(), k.float(), v.float())
    assert asked == []
    torch.testing.assert_close(attention(q, k, v).float(), want, rtol=0, atol=2e-2)
    assert asked == [{"causal": True, "deterministic": False}]


@pytest.mark.parametrize(
    "changes",
    [{"dtype": torch.float32}, {"N": 80}, {"S": 63}, {"B": 1}, {"E": 36}, {"E": 256}],
    ids=str,
)
def test_torch_does_the_rest(asked: list[dict[str, Any]], changes: dict[str, Any]) -> None:
    attention(*drawn(**changes))
    assert asked == []


def test_torch_does_what_is_to_be_done_without_kernels(asked: list[dict[str, Any]]) -> None:
    with devices.without_kernels():
        attention(*drawn())
    assert asked == []


def test_it_is_asked_for_the_same_bits_each_time_where_the_run_is(asked: list[dict[str, Any]]) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        attention(*drawn())
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [{"causal": True, "deterministic": True}]


def test_another_gpu_has_torchs(asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "generation", lambda device: 8)
    attention(*drawn())
    assert asked == []


@pytest.mark.parametrize("broken", [False, True])
def test_a_package_that_is_missing_or_broken_leaves_it_to_torch(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    told: list[str] = []
    monkeypatch.setattr("pentode.log.warning", told.append)
    if broken:

        def fail(name: str) -> str:
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(importlib.metadata, "version", fail)
    else:
        monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    attention(*drawn())
    assert asked == []
    want = "flash-attn-4 is installed, but does not load (RuntimeError: no such kernel); torch attends"
    assert told == ([want] if broken else [])


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "K", "E"), [(8, 2, 64), (4, 4, 128)])
def test_its_values_and_gradients_are_those_of_the_formula(
    H: int, K: int, E: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flash.is_usable(torch.device("cuda", 0)):
        pytest.skip("flash-attn-4 is not installed, or not for this GPU")
    monkeypatch.setattr(flash, "LARGE", 0)
    q, k, v = (t.cuda(0).requires_grad_() for t in drawn(B=2, S=512, H=H, K=K, E=E))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    assert flash.serves(q, k)
    found, want = attention(q, k, v), attention(*wide)
    grad = torch.randn(found.shape, device=found.device)
    torch.autograd.backward([found, want], [grad.bfloat16(), grad.double()])
    for got, right in zip([found, q.grad, k.grad, v.grad], [want, *(t.grad for t in wide)], strict=True):
        assert got is not None
        torch.testing.assert_close(got.double(), right, rtol=2e-2, atol=2e-2)
