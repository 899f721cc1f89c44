"""One GPU trains alike by torch's own operators, kernels of ours and compiled blocks: every kind's gradient norm."""

import pytest

from tests.helpers.overfit import TOLERANCES, Layout, furthest, overfit
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
