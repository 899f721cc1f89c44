"""Kernels of ours without a GPU: operators and the optimizer take the CPU for one, and Triton interprets.

Triton reads TRITON_INTERPRET when it is imported; tests/conftest.py sets it.
"""

import importlib
import pkgutil
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

import pytest

import pentode.ops
import pentode.optim
from pentode import device as devices

NEEDS_ITS_PACKAGE = "fused_epilogue"
CHOOSES = "pentode.run.compiled"  # the kernels of a run's loss and optimizer


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, take the way of a GPU wherever there may be a kernel; whatever else asks has a CPU."""
    spec = spec_from_file_location("pentode.device_with_kernels", devices.__file__)
    assert spec is not None
    assert spec.loader is not None
    gpu = module_from_spec(spec)
    spec.loader.exec_module(gpu)
    gpu.__dict__.update(
        is_gpu=lambda device: True, multiprocessors=lambda device: 4, _WITHOUT_KERNELS=devices._WITHOUT_KERNELS
    )
    for module in (*_modules(pentode.ops), *_modules(pentode.optim), importlib.import_module(CHOOSES)):
        if vars(module).get("devices") is devices:
            monkeypatch.setattr(module, "devices", gpu)


def _modules(package: ModuleType) -> list[ModuleType]:
    names = [one.name for one in pkgutil.iter_modules(package.__path__) if one.name != NEEDS_ITS_PACKAGE]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]
