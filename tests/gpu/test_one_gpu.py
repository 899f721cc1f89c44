"""One GPU trains alike by torch's own operators, kernels of ours and compiled blocks: every kind's gradient norm."""

from typing import Any

import pytest
import torch

from pentode.ops import flash, fused_products
from pentode.optim import master
from tests.helpers.overfit import TOLERANCES, Found, Layout, furthest, overfit
from tests.helpers.world import World

WORLD = World("nccl")

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_kernels_and_compiled_blocks_have_the_gradient_norms_of_torchs_operators(model: str, dtype: str) -> None:
    plain, *others = (
        WORLD.run(overfit, 1, model=model, layout=Layout(compile=how), dtype=dtype)[0] for how in ("off", "auto", "on")
    )
    for how, found in zip(("auto", "on"), others, strict=True):
        assert all(one.losses[-1] < one.losses[0] - 1 for one in (plain, found))
        worst = furthest(plain, found)
        print(f"{model} | {dtype} | {how} | loss {found.losses[0]:.3f} -> {found.losses[-1]:.3f} | {worst}")
        assert worst[0] < TOLERANCES[dtype]


def overfit_with_flash(**arguments: Any) -> Found:
    """`overfit`, with attention by FlashAttention-4 however small it is."""
    assert flash.PACKAGE.is_usable(torch.device("cuda", 0))
    functions, large, calls = flash.PACKAGE.on(torch.device("cuda", 0)), flash.LARGE, list[int]()

    def forward(*operands: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        calls.append(1)
        return functions.forward(*operands, **options)

    flash.LARGE, flash.PACKAGE.loaded[0] = 0, functions._replace(forward=forward)
    try:
        found = overfit(**arguments)
    finally:
        flash.LARGE, flash.PACKAGE.loaded[0] = large, functions
    assert calls, "it was not asked"
    return found


@pytest.mark.parametrize("recompute", [False, True, "selective"])
@pytest.mark.parametrize("how", ["auto", "on"])
def test_flash_attention_has_the_gradient_norms_of_torchs(how: str, recompute: bool | str) -> None:
    if not flash.PACKAGE.is_usable(torch.device("cuda", 0)):
        pytest.skip("flash-attn-4 is not installed, or not for this GPU")
    arguments = {"model": "llama", "dtype": "bfloat16"}
    plain = WORLD.run(overfit, 1, layout=Layout(compile="off"), **arguments)[0]
    found = WORLD.run(overfit_with_flash, 1, layout=Layout(compile=how, recompute=recompute), **arguments)[0]
    worst = furthest(plain, found)
    print(f"flash | {how} | {recompute} | loss {found.losses[0]:.3f} -> {found.losses[-1]:.3f} | {worst}")
    assert worst[0] < TOLERANCES["bfloat16"]


def overfit_with_fused_products(**arguments: Any) -> Found:
    """`overfit`, with products by quack-kernels however small they are, and all gradients added in sums."""
    device = torch.device("cuda", 0)
    assert fused_products.PACKAGE.is_usable(device)
    before = fused_products.LARGE, master.TOGETHER, fused_products.PACKAGE.loaded[0]
    calls = list[str]()

    def noted(name: str) -> Any:
        def call(*operands: Any, **options: Any) -> Any:
            calls.append(f"{name}{' added' * bool(options.get('add_to_output'))}")
            return getattr(before[2], name)(*operands, **options)

        return call

    fused_products.LARGE, master.TOGETHER = 0, 0
    fused_products.PACKAGE.loaded[0] = fused_products.Functions(*map(noted, fused_products.Functions._fields))
    try:
        found = overfit(**arguments)
    finally:
        fused_products.LARGE, master.TOGETHER, fused_products.PACKAGE.loaded[0] = before
    backward = "gated_backward" if arguments["layout"].recompute == "activation" else "gated_gradient"
    assert {"gated", backward, "product added"} <= set(calls), "they were not asked"
    return found


@pytest.mark.parametrize("recompute", [False, "activation"])
def test_products_with_what_follows_have_the_gradient_norms_of_torchs(recompute: bool | str) -> None:
    if not fused_products.PACKAGE.is_usable(torch.device("cuda", 0)):
        pytest.skip("quack-kernels is not installed, or not for this GPU")
    arguments = {"model": "llama", "dtype": "bfloat16"}
    plain = WORLD.run(overfit, 1, layout=Layout(compile="off"), **arguments)[0]
    found = WORLD.run(overfit_with_fused_products, 1, layout=Layout(recompute=recompute), **arguments)[0]
    worst = furthest(plain, found)
    print(f"products | {recompute} | loss {found.losses[0]:.3f} -> {found.losses[-1]:.3f} | {worst}")
    assert worst[0] < TOLERANCES["bfloat16"]
