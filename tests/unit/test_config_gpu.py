"""Rules of what only GPUs do: products in float8, and steps that are replayed."""

from typing import Any

import pytest

from pentode.config.check_speed import FLOAT8_MULTIPLE
from pentode.config.load import config_from_dict
from pentode.ops.linear import MULTIPLE
from tests.helpers.changed_config import LLAMA, data, found


def float8(**changes: Any) -> dict[str, Any]:
    """Changes that make `data` multiply in float8, and others."""
    shape = LLAMA | {"hidden_size": 64, "intermediate_size": 64}
    return {"model__float8": "tensorwise", "model__model_config": shape} | changes


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"model__dtype": "float32"},
            "model.float8: tensorwise with model.dtype float32; use bfloat16, or leave float8 out",
        ),
        (
            {"parallelism__tp": 2, "parallelism__tp_linear_async_communication": True},
            "model.float8: tensorwise with tp_linear_async_communication is not built yet; set that to false",
        ),
        (
            {"parallelism__tp": 2, "parallelism__tp_mode": "REDUCE_SCATTER"},
            "model.float8: tensorwise with tp_recompute_allgather is not built yet; set that to false",
        ),
        (
            {"parallelism__recompute_layer": "activation"},
            "model.float8: tensorwise with recompute_layer activation is not built yet; use selective, or false",
        ),
        (
            {"model__model_config__hidden_size": 72, "model__model_config__num_key_value_heads": 4},
            "model.float8: the model's width of 72 is not a multiple of 16 x tp=1",
        ),
        (
            {"parallelism__tp": 2, "model__model_config__intermediate_size": 48},
            "model.float8: the model's feed-forward width of 48 is not a multiple of 16 x tp=2",
        ),
        (
            {
                "model__model_config__hidden_size": 48,
                "model__model_config__num_attention_heads": 12,
                "model__model_config__num_key_value_heads": 3,
            },
            "model.float8: the 24 features of keys and values on a rank are not a multiple of 16",
        ),
        (
            {"parallelism__tp": 4, "model__model_config__num_attention_heads": 16},
            "model.float8: the 8 features of keys and values on a rank are not a multiple of 16",
        ),
        (
            {"tokens__sequence_length": 12},
            "tokens.sequence_length: 12 x tokens.micro_batch_size=2 tokens is not a multiple of 16, "
            "which model.float8 needs",
        ),
        (
            {"data_stages__0__sequence_length": 4},
            "data_stages.0.sequence_length: 4 x tokens.micro_batch_size=2 tokens is not a multiple of 16, "
            "which model.float8 needs",
        ),
    ],
)
def test_float8_needs_bfloat16_and_multiples_of_16(changes: dict[str, Any], problem: str) -> None:
    assert found(**float8(**changes)) == [problem]
    config_from_dict(data(**float8(**changes | {"model__float8": None})))
    config_from_dict(data(**float8()))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", None])
@pytest.mark.parametrize("layout", [{}, {"tp_mode": "REDUCE_SCATTER", "tp_recompute_allgather": False}])
def test_float8_is_allowed_under_tensor_parallelism(recipe: str | None, layout: dict[str, Any]) -> None:
    parallelism = {"dp": 1, "tp": 2, "pp": 1} | layout
    assert config_from_dict(data(**float8(model__float8=recipe, parallelism=parallelism))).model.float8 == recipe


def test_the_multiple_of_float8_is_that_of_its_products() -> None:
    assert FLOAT8_MULTIPLE == MULTIPLE


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"parallelism__dp": 2},
            "on, but parallelism has 2 ranks, and steps of one GPU alone are replayed; use auto, or off",
        ),
        (
            {"parallelism__tp": 2, "parallelism__pp": 2},
            "on, but parallelism has 4 ranks, and steps of one GPU alone are replayed; use auto, or off",
        ),
        (
            {"general__device": "cpu"},
            "on, but general.device is cpu, and steps of one GPU alone are replayed; use auto, or off",
        ),
        (
            {"general__ignore_sanity_checks": False},
            "on, but general.ignore_sanity_checks is false, and a replayed step checks nothing; set it to true",
        ),
    ],
)
def test_a_step_is_replayed_as_asked_or_that_is_refused(changes: dict[str, Any], problem: str) -> None:
    assert found(model__cuda_graph="on", **changes) == [f"model.cuda_graph: {problem}"]
    for wanted in ("auto", "off"):
        config_from_dict(data(model__cuda_graph=wanted, **changes))
    config_from_dict(data(model__cuda_graph="on"))
