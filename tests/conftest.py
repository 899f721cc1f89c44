"""What every test starts from: one thread, so that tests side by side do not fight for cores; fixed seeds; no hub."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and in the processes that tests start
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"  # read when triton is imported

from hypothesis import settings

from pentode import log
from tests.helpers.interpreted import interpret

torch.set_num_threads(1)
ON_GPU = torch.cuda.is_available()

settings.register_profile("pentode", deadline=None, derandomize="CI" in os.environ)  # CI: the same examples every time
settings.load_profile("pentode")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; where there is one, kernels run on it."""
    for item in items:
        if not ON_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU here"))
        elif ON_GPU and "kernels" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def fresh_log() -> None:
    """A test that set the log up on a stream of its own leaves it to nobody."""
    log.setup()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """A test that draws from torch's generator draws the same numbers alone and among others."""
    torch.manual_seed(0)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where operators are kernels of ours: a GPU, or, without one, the CPU, by Triton's interpreter."""
    if ON_GPU:
        return torch.device("cuda")
    pytest.importorskip("triton", minversion="3.7")  # before, its interpreter does not go with newer versions of numpy
    interpret(monkeypatch)
    return torch.device("cpu")
