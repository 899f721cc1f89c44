"""A model that multiplies in float8 learns as one in bfloat16 does, and writes text from its checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pentode import device as devices
from pentode.cli import run_command
from pentode.generate.command import refuse_early
from pentode.ops.linear import Float8
from pentode.run.build import build_stages
from pentode.train.step import train_step
from tests.helpers.steps import step_batches, tiny_run
from tests.helpers.tiny import rows, tiny_yaml

LLAMA = {"type": "llama", "vocab_size": -1, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
RECIPES: list[Float8] = ["tensorwise", "rowwise"]
STEPS = 20


def changes(float8: Float8 | None) -> dict[str, Any]:
    return {"model__model_config": LLAMA, "model__dtype": "bfloat16", "model__float8": float8}


def losses(folder: Path, float8: Float8 | None) -> list[float]:
    """Those of steps on one batch, before it is known by heart: what is left of a loss then is no measure."""
    run = tiny_run(folder, **changes(float8))
    batches = step_batches(run, 1)
    return [train_step(run, batches, learning_rate=3e-3).loss.item() for _ in range(STEPS)]


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(tmp_path_factory.mktemp("bfloat16"), None)


@pytest.mark.parametrize("float8", RECIPES)
def test_the_loss_falls_as_in_bfloat16(tmp_path: Path, in_bfloat16: list[float], float8: Float8) -> None:
    found = losses(tmp_path, float8)
    assert found[-1] < 0.5 * found[0]
    assert found != in_bfloat16, "nothing was multiplied in float8"
    # Numbers have 4 significant bits: products are off by percents, a loss, which is a mean of many, by about one.
    assert found == pytest.approx(in_bfloat16, rel=0.03)


@pytest.mark.parametrize("float8", RECIPES)
def test_a_checkpoint_goes_on_and_writes_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], float8: Float8
) -> None:
    file = str(tiny_yaml(tmp_path, **changes(float8)))
    assert run_command(["train", file, "tokens.train_steps=4"]) == 0
    assert run_command(["train", file, "tokens.train_steps=8"]) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 9))
    capsys.readouterr()
    arguments = ["generate", str(tmp_path / "run"), "--prompt", "the", "--max-new-tokens", "9", "--temperature", "0"]
    assert run_command(arguments) == 0  # a single token, as later ones are, could not be cut in 16
    assert capsys.readouterr().out.strip().startswith("the")
    refuse_early(tmp_path / "run", ["the"], tp=2, pp=1)  # 48 features of two ranks would not do for float8


@pytest.mark.parametrize("float8", RECIPES)
def test_what_generates_multiplies_as_it_always_does(tmp_path: Path, float8: Float8) -> None:
    run = tiny_run(tmp_path, **changes(float8))
    for training in (True, False):
        (model,) = build_stages(run.config, run.mesh, run.device, training=training).values()
        assert model.place.float8 == (float8 if training else None)


def test_a_torch_that_scales_no_rows_on_a_cpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.problems("cpu", float8="rowwise") == []

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch, "_scaled_mm", fail)
    want = f"model.float8: rowwise on a CPU needs a newer torch than {torch.__version__}; use tensorwise"
    assert devices.problems("cpu", float8="rowwise") == [want]
    assert devices.problems("cpu", float8="tensorwise") == []
    assert devices.problems("cpu") == []
