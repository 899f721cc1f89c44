"""FlashAttention-4 does the attention that it is faster for, where it is installed; elsewhere torch does."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pentode import device as devices
from pentode.ops import flash
from pentode.ops.attention import attention
from pentode.parallel.recompute import recomputing

SHAPE = {"B": 2, "S": 64, "H": 4, "K": 2, "E": 32}
NUMBERS = 2 * 4 * 64 * 64 * 32


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a package in the real one's place is asked, on what passes for a GPU of Hopper's generation."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(flash.PACKAGE, "loaded", {})

    def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]:
        calls.append(options)
        return formula(q, k, v), torch.zeros(q.shape[0], q.shape[2], q.shape[1]), torch.empty(0)

    def backward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, **options: Any
    ) -> tuple[Tensor, ...]:
        calls.append(options)
        return gradients(q, k, v, dout)

    package, cute, interface = (ModuleType(name) for name in ("flash_attn", "flash_attn.cute", "interface"))
    vars(interface).update(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    vars(cute).update(interface=interface)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4")
    monkeypatch.setattr(devices, "is_gpu", lambda device: True)
    monkeypatch.setattr(devices, "generation", lambda device: 9)
    monkeypatch.setattr(flash, "LARGE", NUMBERS)
    monkeypatch.setenv("HOME", os.devnull)  # where nothing can be kept
    return calls


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bjhe->bihe", probabilities(q, k), repeated(v, q)).to(q.dtype)


def gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Of q, k and v, in closed form: an operator's own code is not differentiated."""
    p = probabilities(q, k)
    dv = torch.einsum("bhij,bihe->bjhe", p, grad.double())
    dp = torch.einsum("bihe,bjhe->bhij", grad.double(), repeated(v, q))
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dq = torch.einsum("bhij,bjhe->bihe", ds, repeated(k, q))
    dk = torch.einsum("bhij,bihe->bjhe", ds, q.double())
    dk, dv = (t.unflatten(2, (k.shape[2], -1)).sum(3) for t in (dk, dv))
    return tuple(t.to(q.dtype) for t in (dq, dk, dv))


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """[B, H, S, S]"""
    scores = torch.einsum("bihe,bjhe->bhij", q.double(), repeated(k, q)) * q.shape[-1] ** -0.5
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def repeated(t: Tensor, q: Tensor) -> Tensor:
    """Each key's or value's head as often as query heads share it, in float64."""
    return t.double().repeat_interleave(q.shape[2] // t.shape[2], 2)


def drawn(dtype: torch.dtype = torch.bfloat16, *, N: int | None = None, **changes: int) -> list[Tensor]:
    """q, k and v."""
    B, S, H, K, E = (SHAPE | changes).values()
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, S, H, E), (B, N or S, K, E), (B, N or S, K, E))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


FORWARD = {"causal": True, "return_lse": True}
BACKWARD = {"causal": True, "deterministic": False}


def attended(attend: Callable[..., Tensor], operands: list[Tensor]) -> list[Tensor]:
    """Values and gradients."""
    leaves = [t.detach().requires_grad_() for t in operands]
    y = attend(*leaves)
    return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def test_it_does_what_is_large(asked: list[dict[str, Any]]) -> None:
    want = attended(attention, [t.float() for t in drawn()])
    assert asked == []
    for got, right in zip(attended(attention, drawn()), want, strict=True):
        torch.testing.assert_close(got.float(), right, rtol=2e-2, atol=2e-2)
    assert asked == [FORWARD, BACKWARD]


def test_it_is_in_compiled_code_where_it_was_loaded_before(asked: list[dict[str, Any]]) -> None:
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    attended(compiled, drawn())
    assert asked == []
    torch.compiler.reset()
    assert flash.PACKAGE.is_usable(torch.device("cpu"))
    found = attended(torch.compile(attention, fullgraph=True, backend="aot_eager"), drawn())
    assert asked == [FORWARD, BACKWARD]
    assert all(torch.equal(got, want) for got, want in zip(found, attended(attention, drawn()), strict=True))


def test_selective_recomputation_keeps_it(asked: list[dict[str, Any]]) -> None:
    attended(recomputing(attention, "selective"), drawn())
    assert asked == [FORWARD, BACKWARD]
    asked.clear()
    attended(recomputing(attention, True), drawn())
    assert asked == [FORWARD, FORWARD, BACKWARD]


def test_its_operators_are_as_torch_wants_them(asked: list[dict[str, Any]]) -> None:
    q, k, v = (t.requires_grad_() for t in drawn())
    assert flash.PACKAGE.is_usable(q.device)
    torch.library.opcheck(flash.OPERATOR, (q, k, v), test_utils=("test_schema", "test_faketensor"))
    y, sums = flash.OPERATOR(q, k, v)
    torch.library.opcheck(flash.BACKWARD, (y, q, k, v, y, sums), test_utils=("test_schema", "test_faketensor"))
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v)
    assert counter.get_total_flops() == 4 * NUMBERS


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
        attended(attention, drawn())
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [FORWARD, BACKWARD | {"deterministic": True}]


def test_another_gpu_has_torchs(asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "generation", lambda device: 8)
    attention(*drawn())
    assert asked == []


def test_a_package_that_lacks_a_part_leaves_it_to_torch(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("pentode.log.warning", told.append)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    attention(*drawn())
    assert asked == []
    (line,) = told
    assert line.startswith("flash-attn-4 4 is installed, but does not load (ModuleNotFoundError: ")
    assert line.endswith("; torch attends")


def test_another_version_that_takes_other_arguments_leaves_it_to_torch(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("pentode.log.warning", told.append)
    interface = sys.modules["flash_attn.cute"].interface
    monkeypatch.setattr(interface, "_flash_attn_bwd", lambda q, k, v, out, grad, lse, causal, deterministic: None)
    attention(*drawn())
    assert asked == []
    (line,) = told
    assert "does not load (TypeError: missing a required argument: 'grad')" in line


def test_it_begins_without_torchs_compiler() -> None:
    program = """
import sys, torch
from pentode.ops import flash
functions = flash.Functions(
    lambda q, k, v, **_: (q.clone(), q.float().sum(-1).mT),
    lambda q, k, v, dout, **_: (dout.clone(), k.clone(), v.clone()),
)
flash.PACKAGE.loaded[None] = functions
q = torch.ones(1, 4, 2, 8, requires_grad=True)
flash.flash_attention(q, q, q).sum().backward()
print(sorted({"sympy", "torch._dynamo", "torch._inductor"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "K", "E"), [(8, 2, 64), (4, 4, 128)])
def test_its_values_and_gradients_are_those_of_the_formula(
    H: int, K: int, E: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flash.PACKAGE.is_usable(torch.device("cuda", 0)):
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
