"""The gradient norm and the clip factor, against torch.nn.utils.clip_grad_norm_."""

import pytest
import torch
from torch import nn

from pentode.dist.mesh import Axis
from pentode.optim.clip import clip_scale, squared_norm
from pentode.optim.groups import Group
from pentode.optim.master import MasterWeights
from pentode.parallel.spec import Cut, ParamSpec, parameter


def master_with(gradients: dict[str, torch.Tensor], *, specs: dict[str, ParamSpec] | None = None) -> MasterWeights:
    """MasterWeights that hold these gradients."""
    parameters = {}
    for name, gradient in gradients.items():
        spec = (specs or {}).get(name) or ParamSpec(tuple(gradient.shape))
        parameters[name] = parameter(spec, device=torch.device("cpu"), dtype=gradient.dtype)
    master = MasterWeights(
        parameters,
        groups=[Group(tuple(gradients), 0.0)],
        data=Axis("data"),
        bucket_bytes=1000,
        accumulate_in=next(iter(gradients.values())).dtype,
    )
    for name, gradient in gradients.items():
        master.gradients[name].copy_(gradient)
    return master


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_norm_and_scale_are_those_of_torch(dtype: torch.dtype, max_norm: float) -> None:
    torch.manual_seed(0)
    gradients = {f"layers.{i}.w": torch.randn(13, i + 1, dtype=dtype) for i in range(4)}
    master = master_with(gradients)
    norm = squared_norm(master).sqrt()
    scale = clip_scale(norm, max_norm)
    theirs = [nn.Parameter(torch.empty_like(g)) for g in gradients.values()]
    for p, g in zip(theirs, gradients.values(), strict=True):
        p.grad = g.clone()
    want = nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm.dtype == dtype
    assert norm.shape == scale.shape == ()
    torch.testing.assert_close(norm, want)
    for p, g in zip(theirs, gradients.values(), strict=True):
        torch.testing.assert_close(g * scale, p.grad)


def test_without_a_bound_the_scale_is_one() -> None:
    assert clip_scale(torch.tensor(1e9), None) == 1


def test_a_gradient_within_the_bound_is_not_touched() -> None:
    assert clip_scale(torch.tensor(0.9), 1.0) == 1


def test_a_long_float32_gradient_has_a_precise_norm() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(5_000_000) * 1e-3
    norm = squared_norm(master_with({"w": gradient})).sqrt()
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(gradient.double().norm().item(), rel=1e-6)


def test_bfloat16_gradients_are_summed_in_float32() -> None:
    gradient = torch.ones(300, 300, dtype=torch.bfloat16)
    norm = squared_norm(master_with({"w": gradient})).sqrt()
    assert norm.dtype == torch.float32
    assert norm == 300


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_element_makes_the_norm_not_finite(bad: float) -> None:
    gradient = torch.zeros(3, 3)
    gradient[1, 1] = bad
    assert not torch.isfinite(squared_norm(master_with({"w": gradient})).sqrt())


@pytest.mark.parametrize(("rank", "want"), [(0, 5.0), (1, 3.0)])
def test_a_copy_counts_on_the_first_tensor_parallel_rank_only(rank: int, want: float) -> None:
    tp = Axis("tp", 2, rank)
    master = master_with(
        {"norm.weight": torch.full((4,), 2.0), "layers.0.w": torch.full((9, 1), 1.0)},
        specs={"layers.0.w": ParamSpec((9, 2), cut=Cut(1, tp, (2,))), "norm.weight": ParamSpec((4,), copies=tp)},
    )
    assert squared_norm(master).sqrt() == want
