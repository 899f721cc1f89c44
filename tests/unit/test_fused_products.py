"""Products with what follows them: which, on which GPU, by which tiles; and on a GPU, that they are the formula's."""

import importlib.metadata
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from pentode import device as devices
from pentode.ops import fused_products
from pentode.ops.activation import swiglu
from pentode.ops.feed_forward import is_fused, swiglu_layer
from pentode.ops.fused_products import TILES, _best
from pentode.ops.gradient_sum import put_beside, sum_of
from pentode.ops.linear import linear
from tests.helpers import fused

T, K, F = 48, 32, 24
WIDE, TALL = TILES[1], TILES[0]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings, where a package in the real one's place is installed on what passes for a GPU of Hopper's."""
    warnings: list[str] = []
    names = ("gemm_config", "gemm_interface", "cross_entropy", "activation", "epilogue", "epilogue.frontend")
    quack = {name: ModuleType(f"quack.{name}") for name in names}
    config, interface, loss, activation, _, frontend = quack.values()
    vars(config).update(GemmConfig=lambda **numbers: numbers)
    vars(loss).update(cross_entropy_fwd_out=fused.cross_entropy)
    vars(activation).update(dgate_fn_map={"swiglu": None})
    vars(frontend).update(
        gemm_epilogue=lambda mode: lambda function: lambda A, B, C, *, out, tuned, config, dynamic_scheduler: function,
        pack=None,
        unpack=None,
    )
    vars(interface).update(
        gemm_act=lambda A, B, *, activation, tuned, config, concat_layout: None,
        gemm_dact=lambda A, B, PreAct, *, activation, tuned, config, dynamic_scheduler: None,
        gemm_tuned=SimpleNamespace(
            fn=lambda A, B, out, C=None, *, alpha=1.0, config, add_to_output=False, concat_layout=(): None
        ),
    )
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    for name, module in quack.items():
        monkeypatch.setitem(sys.modules, f"quack.{name}", module)
    monkeypatch.delitem(sys.modules, "pentode.ops.fused_epilogue", raising=False)
    monkeypatch.setattr(fused_products.PACKAGE, "loaded", {})
    monkeypatch.setattr(fused_products, "LARGE", T * K * F)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0")
    monkeypatch.setattr(devices, "is_gpu", lambda device: True)
    monkeypatch.setattr(devices, "generation", lambda device: 9)
    monkeypatch.setattr("pentode.log.warning", warnings.append)
    monkeypatch.setenv("HOME", os.devnull)  # where nothing can be kept
    return warnings


def operands(dtype: torch.dtype = torch.bfloat16, **changes: int) -> tuple[Tensor, Tensor]:
    """x and a weight."""
    sizes = {"T": T, "K": K, "N": F} | changes
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(sizes[n], sizes["K"], generator=generator).to(dtype) for n in "TN")
    return x, weight


@pytest.mark.usefixtures("told")
def test_they_do_what_is_large_in_bfloat16() -> None:
    assert fused_products.serves(*operands())
    assert fused_products.PACKAGE.is_loaded(torch.device("cpu"))
    assert is_fused(*operands(N=48))
    with torch.no_grad():
        assert not is_fused(*operands(N=48)), "no backward is to come"
    assert fused_products.serves(*operands(N=40))
    assert not is_fused(*operands(N=40)), "gate and up are 20 wide"


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize(
    "changes",
    [{"dtype": torch.float32}, {"dtype": torch.float64}, {"T": 40}, {"T": 52}, {"K": 36}, {"N": 28}],
    ids=str,
)
def test_torch_does_the_rest(changes: dict[str, Any]) -> None:
    assert not fused_products.serves(*operands(**changes))
    assert not fused_products.PACKAGE.is_loaded(torch.device("cpu"))


@pytest.mark.usefixtures("told")
def test_torch_does_what_is_compiled_or_to_be_done_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for left_out in (devices.without_kernels, fused_products.left_out):
        with left_out():
            assert not fused_products.serves(*operands())
        assert fused_products.serves(*operands())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not fused_products.serves(*operands())
    x, weight = operands()
    put_beside(weight, weight.float())
    assert fused_products.sum_for(x, weight) is None


def test_another_gpu_has_torchs(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "generation", lambda device: 10)
    assert not fused_products.serves(*operands())
    assert told == []


@pytest.mark.parametrize("lacking", ["a module", "a function"])
def test_a_package_that_lacks_a_part_leaves_it_to_torch(
    told: list[str], monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    if lacking == "a module":
        monkeypatch.setitem(sys.modules, "quack.gemm_config", None)
    else:
        monkeypatch.delattr(sys.modules["quack.gemm_interface"], "gemm_dact")
    assert not fused_products.serves(*operands())
    (line,) = told
    assert line.startswith("quack-kernels 0 is installed, but does not load (")


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("gemm_act", lambda A, B, *, activation, tuned, config: None),
        ("gemm_dact", lambda A, B, *, activation, tuned, config: None),
        ("gemm_tuned", SimpleNamespace(fn=lambda A, B, out, C=None, *, config: None)),
        ("gemm_tuned", SimpleNamespace(fn=lambda A, B, out, C=None, *, config, add_to_output, concat_layout: None)),
        ("gemm_tuned", lambda A, B, out, C=None, *, alpha, config, add_to_output=False, concat_layout=(): None),
        ("cross_entropy_fwd_out", lambda x, target, loss, lse: None),
        ("gemm_epilogue", lambda mode: lambda function: lambda A, B, C, *, out: None),
    ],
)
def test_another_version_that_takes_other_arguments_leaves_it_to_torch(
    told: list[str], monkeypatch: pytest.MonkeyPatch, name: str, other: object
) -> None:
    where = {"cross_entropy_fwd_out": "cross_entropy", "gemm_epilogue": "epilogue.frontend"}.get(name, "gemm_interface")
    monkeypatch.setattr(sys.modules[f"quack.{where}"], name, other)
    assert not fused_products.serves(*operands())
    assert len(told) == 1


@pytest.mark.parametrize(
    ("rows", "columns", "want"),  # the faster one on an H100, 2026-11-27
    [
        (28672, 4096, TALL),
        (4096, 14336, TALL),
        (6144, 4096, TALL),
        (4096, 4096, TALL),
        (128256, 4096, TALL),
        (16384, 4096, TALL),
        (16384, 2048, TALL),
        (2048, 8192, TALL),
        (3072, 2048, WIDE),
        (2048, 2048, TALL),
        (32768, 2048, TALL),
    ],
)
def test_tiles_are_those_that_were_measured_to_be_faster(rows: int, columns: int, want: tuple[int, ...]) -> None:
    assert _best(rows, columns, 132) == want


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("summed", [False, True])
def test_a_layer_has_autograds_gradients_in_sums_or_given_back(summed: bool, recompute: bool, again: bool) -> None:
    x, gate_up, down = drawn(T, K, seed=0), drawn(2 * F, K, seed=1) / 6, drawn(K, F, seed=2) / 6
    leaves = [t.requires_grad_() for t in (x, gate_up, down, drawn(T, K, seed=5))]
    stream, grads = leaves[3], (drawn(T, K, seed=3), drawn(T, K, seed=4))
    want = stream + swiglu(x @ gate_up.T) @ down.T
    (want_x, *want_weights, want_stream) = torch.autograd.grad(want, leaves, grads[0] + grads[1], retain_graph=True)
    totals = [put_beside(t, torch.full_like(t, torch.nan)).total for t in (gate_up, down)] if summed else []
    calls: list[str] = []
    with fused.served(calls):
        for grad in grads:  # two micro-batches
            operands = leaves[:3]
            if recompute:
                y = checkpoint(swiglu_layer, *operands, onto=stream, again=again, use_reentrant=False)
                assert y is not None
            else:
                y = swiglu_layer(*operands, onto=stream, again=again)
            torch.testing.assert_close(y, want)
            y.backward(grad)
    torch.testing.assert_close(x.grad, want_x)
    torch.testing.assert_close(stream.grad, want_stream)
    for weight, total, right in zip((gate_up, down), totals or (None, None), want_weights, strict=True):
        assert (weight.grad is None) == summed
        torch.testing.assert_close(weight.grad if total is None else total, right)
    assert calls.count("product added") == (2 if summed else 0)
    assert [calls.count(name) for name in ("gated_backward", "gated_gradient")] == ([2, 0] if again else [0, 2])


def test_what_is_computed_again_is_not_kept() -> None:
    x, gate_up, down = drawn(T, K, seed=0), drawn(2 * F, K, seed=1), drawn(K, F, seed=2).requires_grad_()
    kept: list[list[tuple[int, ...]]] = []
    for again in (False, True):
        kept.append([])
        with fused.served([]), saved_tensors_hooks(lambda t: kept[-1].append(tuple(t.shape)) or t, lambda t: t):
            swiglu_layer(x, gate_up, down, onto=x, again=again)
    assert kept[0] == [*kept[1], (T, F)]


@pytest.mark.usefixtures("told")
def test_a_loss_over_long_rows_in_bfloat16_is_for_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_products, "LONG", 32)
    monkeypatch.setattr(fused_products, "LONGEST", 40)
    logits = torch.zeros(3, 48, dtype=torch.bfloat16)
    assert not fused_products.serves_loss(logits[:, :40]), "no product was large enough"
    assert fused_products.PACKAGE.is_usable(logits.device)
    assert [V for V in range(49) if fused_products.serves_loss(logits[:, :V])] == [32, 40]
    logits = logits[:, :40]
    assert not fused_products.serves_loss(logits.float())
    for left_out in (devices.without_kernels, fused_products.left_out):
        with left_out():
            assert not fused_products.serves_loss(logits)


@pytest.mark.parametrize("served", [False, True])
def test_a_linear_layer_adds_to_its_weights_sum(served: bool) -> None:
    x, weight, grad = drawn(T, K, seed=0).requires_grad_(), drawn(F, K, seed=1).requires_grad_(), drawn(T, F, seed=2)
    total = put_beside(weight, drawn(F, K, seed=3)).total
    found = sum_of(weight)
    assert found is not None
    found.begun = True
    before = total.clone()
    if not served:
        linear(x, weight).backward(grad)
        torch.testing.assert_close(weight.grad, grad.T @ x.detach())
        assert torch.equal(total, before), "autograd has the gradient, and gives it to the optimizer"
        return
    with fused.served([]):
        linear(x, weight).backward(grad)
    assert weight.grad is None
    torch.testing.assert_close(total, before + grad.T @ x.detach())
    torch.testing.assert_close(x.grad, grad @ weight.detach())


def test_asking_for_them_imports_nothing_without_a_gpu() -> None:
    program = """
import sys, torch
from pentode.ops import fused_products
weight = torch.ones(8, 8, dtype=torch.bfloat16)
assert not fused_products.serves(weight, weight)
print(sorted({"quack", "torch._dynamo", "torch._inductor"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "N", "K"), [(512, 1000, 256), (264, 2048, 776)])
def test_a_scaled_gradient_on_a_gpu_is_the_formulas(T: int, N: int, K: int) -> None:
    device = torch.device("cuda", 0)
    if not fused_products.PACKAGE.is_usable(device):
        pytest.skip("quack-kernels is not installed, or not for this GPU")
    grad, x = (drawn(T, n, seed=n).bfloat16().to(device) for n in (N, K))
    scale = torch.tensor(1 / 3, device=device)
    found = put_beside(x, torch.full((N, K), torch.nan, device=device))
    for times in (1, 2):
        fused_products.add_weight_gradient(grad, x, found, scale)
        want = times * scale.double() * (grad.double().T @ x.double())
        assert (found.total - want).norm() < 1e-5 * want.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize(("T", "K", "F"), [(512, 256, 384), (1000, 4096, 776), (264, 136, 200)])
def test_a_layer_on_a_gpu_is_the_formulas(
    T: int, K: int, F: int, summed: bool, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", 0)
    if not fused_products.PACKAGE.is_usable(device):
        pytest.skip("quack-kernels is not installed, or not for this GPU")
    monkeypatch.setattr(fused_products, "LARGE", 0)
    wide = [drawn(T, K, seed=0), drawn(2 * F, K, seed=1) / K**0.5, drawn(K, F, seed=2) / F**0.5]
    narrow = [t.bfloat16().to(device).requires_grad_() for t in wide]
    wide = [t.detach().double().requires_grad_() for t in narrow]
    grad = drawn(T, K, seed=3).bfloat16().to(device)
    stream = drawn(T, K, seed=4).bfloat16().to(device)
    want_y = stream.double() + swiglu(wide[0] @ wide[1].T) @ wide[2].T
    want_y.backward(2 * grad.double())
    totals = [put_beside(t, torch.full_like(t, torch.nan, dtype=torch.float32)).total for t in narrow[1:]]
    if not summed:
        for weight in narrow[1:]:
            del weight.gradient_sum  # pyright: ignore[reportAttributeAccessIssue]
    assert is_fused(*narrow[:2])
    y = stream
    for _ in range(2):
        y = swiglu_layer(*narrow, onto=stream, again=again)
        y.backward(grad)
    torch.testing.assert_close(y.double(), want_y, rtol=2e-2, atol=2e-2)
    found = [narrow[0].grad, *(totals if summed else (t.grad for t in narrow[1:]))]
    for got, want in zip(found, wide, strict=True):
        assert got is not None
        assert want.grad is not None
        error = (got.double() - want.grad).norm() / want.grad.norm()
        assert error < 6e-3, error
        lines = (got.double() - want.grad).norm(dim=1) / want.grad.norm(dim=1)
        assert lines.max() < 2e-2, "a row is wrong"
