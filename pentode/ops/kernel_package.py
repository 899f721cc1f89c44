"""Packages of kernels that a user may have installed, beside torch's: loaded when something is large enough."""

import importlib.metadata
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from threading import Lock, current_thread
from typing import Any, Generic, TypeVar

import torch

from pentode import device as devices
from pentode import log
from pentode.garbage import uncollected
from pentode.ops.kept_kernels import keep_in_home

F = TypeVar("F")
MARKS = Lock()  # held by who replaces them


class KernelPackage(Generic[F]):
    """What is used of a package, for each GPU that has asked.

    name         as pip knows it
    generations  of NVIDIA's GPUs on which its kernels are used
    functions    imports it, and gives what is used of it; raises where that is missing or takes other arguments
    does         what it does, and `instead`, who does where it is installed but cannot: for the log
    loaded       by the device's number; None where it is not usable
    coming       likewise, what a thread is loading
    """

    def __init__(
        self, name: str, *, generations: tuple[int, ...], functions: Callable[[], F], does: str, instead: str
    ) -> None:
        self.name, self.generations, self.functions = name, generations, functions
        self.does, self.instead = does, instead
        self.loaded: dict[int | None, F | None] = {}
        self.coming: dict[int | None, Future[F | None]] = {}

    def load_in(self, threads: Executor, device: torch.device) -> None:
        """Have a thread load it for this GPU. Who asks whether it is usable before it is there waits."""
        if device.index in self.loaded or self._coming_on(device) is not None or self._version(device) is None:
            return
        keep_in_home()  # here: what threads write to the environment others may be reading
        self.coming[device.index] = threads.submit(self._load_beside, device)

    def is_usable(self, device: torch.device) -> bool:
        """Whether it is installed, works, and is for this GPU. What torch compiles knows it if it was asked before."""
        if device.index not in self.loaded and not torch.compiler.is_compiling():
            coming = self._coming_on(device)
            with uncollected():
                self.loaded[device.index] = self._load(device) if coming is None else coming.result()
        return self.is_loaded(device)

    def _coming_on(self, device: torch.device) -> Future[F | None] | None:
        """What a thread is loading or has loaded for this GPU; None where it will not."""
        coming = self.coming.get(device.index)
        return None if coming is None or coming.cancelled() else coming

    def is_loaded(self, device: torch.device) -> bool:
        """Whether something was large enough for it on this GPU, and it is usable."""
        return self.loaded.get(device.index) is not None

    def on(self, device: torch.device) -> F:
        """Its functions, on a GPU where it is usable."""
        found = self.loaded[device.index]
        assert found is not None, f"{self.name} is not usable here"
        return found

    def _load_beside(self, device: torch.device) -> F | None:
        devices.use(device)  # what an import may ask of a GPU is not asked of another rank's
        return self._load(device)

    def _version(self, device: torch.device) -> str | None:
        """Which one is installed; None where none is, or it is not for this GPU."""
        if devices.generation(device) not in self.generations:
            return None
        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def _load(self, device: torch.device) -> F | None:
        version = self._version(device)
        if version is None:
            return None
        keep_in_home()
        try:
            with undecorated():
                found = self.functions()
        except Exception as error:  # noqa: BLE001 - another version, or one whose parts do not go with each other
            why = f"{type(error).__name__}: {error}"
            log.warning(f"{self.name} {version} is installed, but does not load ({why}); {self.instead}")
            return None
        log.info(f"{self.does} ({self.name} {version})")
        return found


@contextmanager
def undecorated() -> Iterator[None]:
    """Leave functions of modules imported meanwhile as they are where those mark them for torch's compiler.

    The marks would import it, most of what flash-attn-4 and quack-kernels take to import (docs/performance.md). What
    is used of such a package here is called by operators that the compiler does not look into. Another thread marks
    and compiles meanwhile as ever.
    """
    with MARKS:
        before = torch.compile, torch.compiler.disable
        setattr(torch, "compile", _in_this_thread(_unmarked, otherwise=before[0]))  # noqa: B010
        setattr(torch.compiler, "disable", _in_this_thread(_unmarked, otherwise=before[1]))  # noqa: B010
        try:
            yield
        finally:
            torch.compile, torch.compiler.disable = before


def _in_this_thread(mark: Callable[..., Any], *, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """`mark` in this thread, another in others.

    quack-kernels looks for `recompile_limit`, and where there is none it sets the compiler's configuration.
    """
    here = current_thread()

    def chosen(*given: Any, recompile_limit: int | None = None, **options: Any) -> Any:
        limit = {} if recompile_limit is None else {"recompile_limit": recompile_limit}
        return (mark if current_thread() is here else otherwise)(*given, **limit, **options)

    return chosen


def _unmarked(function: Any = None, *_: Any, model: Any = None, fn: Any = None, **options: Any) -> Any:
    """The function itself, by whatever name the mark has it; for one of options alone, what leaves it as it is."""
    return next((given for given in (function, model, fn) if given is not None), lambda later: later)
