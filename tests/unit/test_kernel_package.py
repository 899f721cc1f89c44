"""A package of kernels is asked for once on each GPU, and one that cannot be used is left alone."""

import gc
import importlib.metadata
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pentode import device as devices
from pentode.ops.kernel_package import KernelPackage, undecorated
from tests.helpers.source import ROOT

HERE, THERE = torch.device("cuda", 0), torch.device("cuda", 1)


class Told:
    """What was logged, and how often the package was imported; `error` is what that raises."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.imports = 0
        self.error: Exception | None = None

    def functions(self) -> str:
        assert not gc.isenabled(), "imports are looked through again and again"
        self.imports += 1
        if self.error is not None:
            raise self.error
        return "functions"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    found = Told()
    monkeypatch.setattr("pentode.log.warning", found.lines.append)
    monkeypatch.setattr("pentode.log.info", found.lines.append)
    monkeypatch.setattr("pentode.ops.kernel_package.keep_in_home", lambda: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2")
    monkeypatch.setattr(devices, "generation", lambda device: 9 if device == HERE else 8)
    return found


def package(told: Told) -> KernelPackage[str]:
    return KernelPackage(
        "kernels", generations=(9, 10), functions=told.functions, does="Sums by kernels", instead="torch adds"
    )


def test_it_is_imported_once_where_its_kernels_are_for_the_gpu(told: Told) -> None:
    kernels = package(told)
    assert not kernels.is_loaded(HERE), "nothing has asked for it"
    assert [kernels.is_usable(HERE) for _ in range(3)] == [True] * 3
    assert kernels.is_loaded(HERE)
    assert kernels.on(HERE) == "functions"
    assert [kernels.is_usable(THERE) for _ in range(3)] == [False] * 3
    assert (told.imports, told.lines) == (1, ["Sums by kernels (kernels 1.2)"])
    with pytest.raises(AssertionError, match="kernels is not usable here"):
        kernels.on(THERE)


def test_a_thread_that_loads_leaves_the_collector_as_it_is(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[bool] = []
    monkeypatch.setattr(devices, "use", lambda device: None)
    kernels = KernelPackage(
        "kernels",
        generations=(9,),
        functions=lambda: collected.append(gc.isenabled()),
        does="Sums",
        instead="torch adds",
    )
    with ThreadPoolExecutor(1) as threads:
        kernels.load_in(threads, HERE)
        kernels.load_in(threads, THERE)
    assert collected == [True]
    assert THERE.index not in kernels.coming, "it is not for that GPU"


def test_what_is_being_compiled_imports_nothing(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = package(told)
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not kernels.is_usable(HERE)
    assert told.imports == 0
    assert kernels.is_usable(HERE), "it was not taken for one that is missing"


def test_one_that_is_not_installed_is_not_told(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", fail)
    assert not package(told).is_usable(HERE)
    assert (told.imports, told.lines) == (0, [])


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'part'"), TypeError("it takes others")])
def test_one_that_does_not_load_is_told_once(told: Told, error: Exception) -> None:
    kernels, told.error = package(told), error
    assert not any(kernels.is_usable(HERE) for _ in range(3))
    why = f"{type(error).__name__}: {error}"
    assert told.lines == [f"kernels 1.2 is installed, but does not load ({why}); torch adds"]


MARKED = """
import inspect
import torch

@torch.compiler.disable
def one(): ...

@torch.compiler.disable(recursive=False)
def two(): ...

@torch.compile
def three(): ...

four = torch.compile(model=three, dynamic=False, recompile_limit=64)
assert torch.compiler.disable(fn=one) is one
assert "recompile_limit" in inspect.signature(torch.compile).parameters
assert [f.__name__ for f in (one, two, three, four)] == ["one", "two", "three", "three"]
"""
IMPORTS = """
import sys
import torch
from pentode.ops.kernel_package import undecorated

own = torch.compile, torch.compiler.disable
try:
    with undecorated():
        import marked
        raise KeyError
except KeyError:
    pass
assert own == (torch.compile, torch.compiler.disable)
print("torch._dynamo" in sys.modules)
"""


def test_functions_that_a_package_marks_for_the_compiler_do_not_import_it(tmp_path: Path) -> None:
    (tmp_path / "marked.py").write_text(MARKED)
    paths = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", IMPORTS], env=paths, capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr


def test_another_thread_marks_meanwhile_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, *, dynamic: ("compiled", model, dynamic))
    monkeypatch.setattr(torch.compiler, "disable", lambda fn=None, recursive=True: ("disabled", fn, recursive))
    with undecorated(), ThreadPoolExecutor(1) as others:
        assert torch.compile(3, dynamic=True) == torch.compiler.disable(fn=3) == 3
        assert others.submit(lambda: torch.compile(3, dynamic=True)).result() == ("compiled", 3, True)
        assert others.submit(lambda: torch.compiler.disable(recursive=False)).result() == ("disabled", None, False)


def test_a_package_is_imported_with_its_functions_as_they_are(told: Told) -> None:
    marks: list[object] = []
    kernels = KernelPackage(
        "kernels", generations=(9,), functions=lambda: marks.append(torch.compile), does="Sums", instead="torch adds"
    )
    kernels.is_usable(HERE)
    (mark,) = marks
    assert mark is not torch.compile
