"""Two GPUs train what one trains: the gradient norm of every kind of parameter, at the first and the 20th step."""

from functools import cache

import pytest
import torch

from tests.helpers.overfit import TOLERANCES, Found, Layout, furthest, overfit
from tests.helpers.world import World

WORLD = World("nccl")
LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp2 with sequence parallelism": Layout(tp=2, sequence_parallel=True),
    "tp2, messages under products": Layout(tp=2, sequence_parallel=True, overlap=True),
    "tp2, all-reduce under products": Layout(tp=2, overlap=True),
    "tp2, recomputed": Layout(tp=2, sequence_parallel=True, recompute="selective"),
    "pp2 afab": Layout(pp=2),
    "pp2 1f1b": Layout(pp=2, engine="1f1b"),
    "pp2 interleaved": Layout(pp=2, engine="interleaved"),
    "dp2": Layout(dp=2),
    "dp2 ZeRO-1": Layout(dp=2, zero=1),
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@cache
def one_gpu(model: str, dtype: str) -> Found:
    return WORLD.run(overfit, 1, model=model, layout=Layout(), dtype=dtype)[0]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_two_gpus_have_one_gpus_gradient_norms(layout: str, model: str, dtype: str) -> None:
    one, two = one_gpu(model, dtype), WORLD.run(overfit, 2, model=model, layout=LAYOUTS[layout], dtype=dtype)[0]
    assert all(found.losses[-1] < found.losses[0] - 1 for found in (one, two))
    worst = furthest(one, two)
    print(f"{layout} | {model} | {dtype} | loss {two.losses[0]:.3f} -> {two.losses[-1]:.3f} | {worst}")
    assert worst[0] < TOLERANCES[dtype]
