"""One GPU trains alike by kernels of ours and by compiled blocks: the gradient norm of every kind of parameter."""

import pytest

from tests.helpers.overfit import TOLERANCES, Layout, furthest, overfit
from tests.helpers.world import World

WORLD = World("nccl")

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_blocks_of_kernels_and_compiled_blocks_have_one_another_s_gradient_norms(model: str, dtype: str) -> None:
    plain, compiled = (
        WORLD.run(overfit, 1, model=model, layout=Layout(compile=how), dtype=dtype)[0] for how in ("off", "on")
    )
    assert all(found.losses[-1] < found.losses[0] - 1 for found in (plain, compiled))
    worst = furthest(plain, compiled)
    print(f"{model} | {dtype} | loss {plain.losses[0]:.3f} -> {plain.losses[-1]:.3f} | {worst}")
    assert worst[0] < TOLERANCES[dtype]
