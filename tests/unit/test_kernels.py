"""On a GPU operators are kernels of ours: each does what its plain form does, which float64 keeps, in both directions.

Without a GPU, Triton's interpreter runs them on a CPU, at the smallest of the sizes.

The kernels of a backward alone are tested beside their operators: test_ops_norm_rope_attention.py and others.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pentode.ops.activation import gated
from pentode.ops.cross_entropy import MOST_PRODUCTS, PLAIN
from pentode.ops.norm import beside_norm
from pentode.ops.rope import angles, frequencies, rotate_heads
from pentode.optim.adamw import update_

pytestmark = pytest.mark.usefixtures("kernels")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = (torch.bfloat16, torch.float32)
Operator = Callable[..., tuple[Tensor, ...]]


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(operator: Operator, *operands: Tensor | None) -> None:
    """Compare values and gradients with those in float64.

    bfloat16 keeps 8 bits: values up to 4 and sums of rounded products are off by 2e-2. float32 sums some 300 products.
    """
    found: list[list[Tensor]] = []
    for wide in (False, True):
        leaves = [t if t is None else (t.double() if wide else t).clone().requires_grad_() for t in operands]
        values = operator(*leaves)
        grads = [drawn(*y.shape, dtype=torch.float32, seed=i).to(operands[0].dtype) for i, y in enumerate(values)]
        torch.autograd.backward(values, [g.to(y.dtype) for g, y in zip(grads, values, strict=True)])
        found.append([*values, *(t.grad for t in leaves if t is not None)])
    narrow = operands[0].dtype == torch.bfloat16
    for got, want in zip(*found, strict=True):
        assert got.dtype == operands[0].dtype
        close = {"rtol": 1e-2, "atol": 2e-2} if narrow else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(got.double(), want, **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(300, 2048), (64, 4096), (3, 100)] if ON_GPU else [(9, 2048), (3, 100)])
def test_a_norm_beside_its_stream(tokens: int, width: int, biased: bool, adds: bool, dtype: torch.dtype) -> None:
    x, added = (drawn(tokens, width, dtype=dtype, seed=seed) for seed in (1, 2))
    weight, bias = (drawn(width, dtype=dtype, seed=seed) for seed in (3, 4))
    if adds and dtype == torch.bfloat16:
        x, added = x.round(), added.round()  # whose sum is not rounded, so that float64 takes the norm of the same

    def operator(x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None) -> tuple[Tensor, ...]:
        return beside_norm(x, weight, bias, 1e-5, added=added)

    check(operator, x, weight, bias if biased else None, added if adds else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(32, 8, 64), (4, 4, 128), (6, 1, 20)])
def test_rotary_positions(heads: int, kv_heads: int, size: int, interleaved: bool, dtype: torch.dtype) -> None:
    T = 65 if ON_GPU else 5
    cos, sin = angles(torch.arange(T).to(DEVICE), frequencies(size, theta=1e4, dtype=torch.float32).to(DEVICE))

    def operator(x: Tensor) -> tuple[Tensor, ...]:
        exact = torch.promote_types(x.dtype, torch.float32)
        return rotate_heads(x, cos.to(exact), sin.to(exact), kv_heads=kv_heads, interleaved=interleaved)

    check(operator, drawn(T, heads + 2 * kv_heads, size, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "features"), [(3, 2048), (65 if ON_GPU else 5, 5000), (1, 24)])
def test_swiglu(tokens: int, features: int, dtype: torch.dtype) -> None:
    check(lambda x: (gated(x, "silu"),), drawn(tokens, 2 * features, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "held"), [(50304, 50257), (4096, 4096), (40, 7)])
def test_the_gradient_of_logits(rows: int, held: int, dtype: torch.dtype) -> None:
    from pentode.ops.cross_entropy_kernel import PASSES

    logits, hot = drawn(9, rows, dtype=dtype), torch.ones(9, device=DEVICE)
    logits[:, held:] = torch.nan  # whatever stands in the padding
    hot[2] = 0
    top, total = PLAIN.statistics(logits, held)
    row = torch.randint(held, (9,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    others = (top + total.log(), drawn(9, dtype=torch.float32, seed=1), hot, row)
    got, want = logits.clone(), logits.clone()
    PASSES.gradient_(got, held, *others)
    PLAIN.gradient_(want, held, *others)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("count", range(1, MOST_PRODUCTS + 1))
def test_products_are_added_up(count: int, add: bool, dtype: torch.dtype) -> None:
    from pentode.ops.cross_entropy_kernel import PASSES

    products = [drawn(70, 51, dtype=dtype, seed=seed) for seed in range(count)]
    products[0] = products[0].float()  # what was added up before
    scale = torch.tensor(0.3, device=DEVICE)
    got, want = (drawn(70, 51, dtype=dtype, seed=9) if add else drawn(70, 51, dtype=dtype) * torch.nan for _ in "ab")
    PASSES.total_(products, scale, got, add)
    PLAIN.total_(products, scale, want, add)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("model", [torch.bfloat16, None])
@pytest.mark.parametrize("gradients", DTYPES)
def test_the_update_of_adamw(gradients: torch.dtype, model: torch.dtype | None, finite: bool) -> None:
    from pentode.optim.adamw_kernel import update_ as by_kernel

    size = 100 * 128 + 5
    weight, mean, square = (drawn(size, dtype=torch.float32, seed=seed) for seed in range(3))
    gradient = drawn(size, dtype=gradients, seed=3)
    gradient[7] = 0.0 if finite else torch.inf
    tensors = [weight, gradient, mean, square.abs(), None if model is None else drawn(size, dtype=model, seed=4)]
    constants = torch.tensor([0.1, 0.95, 0.05, 1e-8], dtype=torch.float64, device=DEVICE)
    of_step = torch.tensor([0.5, 0.999, 0.001, 0.3], dtype=torch.float64, device=DEVICE)
    found = []
    for update in (by_kernel, update_):
        own = [t if t is None else t.clone() for t in tensors]
        update(*own, constants, of_step, torch.tensor(finite, device=DEVICE))
        found.append([t for t in own if t is not None])
    torch.testing.assert_close(*found)
