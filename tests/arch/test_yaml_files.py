"""Every YAML that we ship loads, means something, and says so without torch."""

from pathlib import Path

import pytest

from pentode.config.dump import to_dict
from pentode.config.load import config_from_dict, load_config
from tests.helpers.source import ROOT

FILES = sorted(path for folder in ("examples", "configs") for path in (ROOT / folder).rglob("*.yaml"))
NEEDED = (
    "examples/char_gpt.yaml",
    "examples/config_tiny_llama.yaml",
    "examples/llama/config_tiny_llama.yaml",
    "examples/llama/one_process.yaml",
    "examples/s3/tiny_llama.yaml",
    "configs/nano.yaml",
    "configs/small.yaml",
    "configs/base.yaml",
)


@pytest.mark.parametrize("path", NEEDED)
def test_the_file_exists(path: str) -> None:
    assert (ROOT / path).is_file(), f"{path}: not there; users type this name"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_loads(path: Path) -> None:
    config = load_config(path)
    assert config.model.model_config.parameter_count(vocab_size=100) > 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_survives_writing(path: Path) -> None:
    config = load_config(path)
    assert config_from_dict(to_dict(config)) == config
