"""SGD over flat buffers, against torch.optim.SGD."""

import pytest
import torch

from pentode.config.kinds.optimizers import SGDOptimizerArgs
from pentode.dist.mesh import Axis
from pentode.optim.groups import Group
from pentode.optim.master import MasterWeights
from pentode.optim.registry import build_optimizer
from pentode.parallel.spec import ParamSpec, parameter
from tests.helpers.masters import weights

SHAPES = {"embed.weight": (7, 5), "layers.0.bias": (31,)}


def masters(dtype: torch.dtype) -> MasterWeights:
    torch.manual_seed(0)
    parameters = {}
    for name, shape in SHAPES.items():
        parameters[name] = parameter(ParamSpec(shape), device=torch.device("cpu"), dtype=dtype)
        torch.nn.init.normal_(parameters[name])
    groups = [Group(("embed.weight",), 0.1), Group(("layers.0.bias",), 0.0)]
    return MasterWeights(parameters, groups=groups, data=Axis("data"), bucket_bytes=100, accumulate_in=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_torch(dtype: torch.dtype) -> None:
    master = masters(dtype)
    optimizer = build_optimizer(SGDOptimizerArgs(), master.shards)
    theirs = {name: torch.nn.Parameter(w.detach().clone()) for name, w in weights(master).items()}
    reference = torch.optim.SGD(
        [{"params": [theirs["embed.weight"]], "weight_decay": 0.1}, {"params": [theirs["layers.0.bias"]]}], lr=0.1
    )
    scale = torch.tensor(0.3)
    for _ in range(5):
        for name, p in theirs.items():
            master.gradients[name].copy_(torch.randn(SHAPES[name]))
            p.grad = master.gradients[name].to(p.dtype) * scale
        reference.step()
        optimizer.step(learning_rate=0.1, scale=scale, finite=torch.tensor(True))
    assert optimizer.updates == 5
    assert optimizer.state() == {}
    for name, p in theirs.items():
        torch.testing.assert_close(weights(master)[name], p.detach())


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    master = masters(torch.float32)
    optimizer = build_optimizer(SGDOptimizerArgs(), master.shards)
    before = [shard.weight.clone() for shard in master.shards]
    master.gradients["embed.weight"].fill_(float("nan"))
    optimizer.step(learning_rate=0.1, scale=torch.tensor(float("nan")), finite=torch.tensor(False))
    assert optimizer.updates == 0
    assert all(torch.equal(shard.weight, w) for shard, w in zip(master.shards, before, strict=True))
