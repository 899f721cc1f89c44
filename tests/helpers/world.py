"""Worlds of ranks that stay: a test's body runs on some of eight processes, which live as long as the session.

WORLD.run(body, 4, case=case)     # a function at module level; its results, by rank

Any rank's failure fails the call with every rank's traceback, and the next call gets new processes.
"""

import atexit
import faulthandler
import gc
import importlib
import importlib.util
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist

HERE = "127.0.0.1"
PATIENCE = 300.0  # seconds after which ranks are taken for hung
SILENCE = 120.0  # seconds after which a rank tells where it stands
GRACE = 5.0  # seconds that the others have to fail, too, when one has
LAST_WORDS = 8000  # bytes shown of what a rank that ended, or hangs, wrote to its stderr

multiprocessing.set_forkserver_preload(["tests.helpers.warm"])


@dataclass
class _Rank:
    process: BaseProcess
    pipe: Connection
    stderr: Path

    def end(self) -> str:
        """How it ended, by itself, and what it said last."""
        self.process.join(GRACE)
        code = self.process.exitcode
        names = {-one.value: one.name for one in signal.Signals}
        how = names.get(code, f"exit code {code}")
        return f"the process has ended: {how}\n{self.last_words()}"

    def last_words(self) -> str:
        return self.stderr.read_bytes()[-LAST_WORDS:].decode(errors="replace")


class World:
    """Up to as many processes as the largest call so far needed; with nccl, each has the GPU of its rank."""

    def __init__(self, backend: str = "gloo") -> None:
        self.backend = backend
        self.start = "spawn" if backend == "nccl" else "forkserver"  # what the server has imported looked for GPUs
        self._ranks: list[_Rank] = []
        self._calls = 0
        self._folder: Path | None = None  # of what ranks write to stderr, from the first rank on

    def run(self, body: Callable[..., Any], ranks: int, **arguments: Any) -> list[Any]:
        """Call `body` on every rank of a new process group; what each returned, in order."""
        context = multiprocessing.get_context(self.start)
        while len(self._ranks) < ranks:
            here, there = context.Pipe()
            self._folder = self._folder or Path(tempfile.mkdtemp(prefix="world-"))
            stderr = self._folder / f"rank-{len(self._ranks)}"
            stderr.write_bytes(b"")
            process = context.Process(target=_serve, args=(there, self.backend, stderr), daemon=True)
            process.start()
            there.close()
            self._ranks.append(_Rank(process, here, stderr))
        helper = body.__module__.startswith("tests.helpers.")  # a test's own module has another name there
        source = body.__module__ if helper else str(sys.modules[body.__module__].__file__)
        self._calls += 1
        meeting = meeting_place().port, f"call {self._calls} of {id(self)}"
        for rank, one in enumerate(self._ranks[:ranks]):
            with suppress(BrokenPipeError):  # it has ended since the last call: `_collect` tells
                one.pipe.send((source, body.__name__, rank, ranks, meeting, arguments))
        found = self._collect(ranks)
        failures = [f"rank {rank}:\n{text}" for rank, (good, text) in sorted(found.items()) if not good]
        if failures or len(found) < ranks:
            silent = sorted(set(range(ranks)) - found.keys())
            failures += [f"no answer from rank {rank}:\n{self._ranks[rank].last_words()}" for rank in silent]
            self.close()
            raise AssertionError("\n".join(failures))
        return [found[rank][1] for rank in range(ranks)]

    def close(self) -> None:
        """End the processes."""
        for one in self._ranks:
            one.process.kill()
            one.process.join()
        self._ranks.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    def _collect(self, ranks: int) -> dict[int, tuple[bool, Any]]:
        """(success, result or traceback) by rank, of those that answered in time."""
        pipes = {self._ranks[rank].pipe: rank for rank in range(ranks)}
        found: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + PATIENCE
        while pipes and (left := end - time.monotonic()) > 0:
            for pipe in wait(list(pipes), timeout=left):
                assert isinstance(pipe, Connection)
                rank = pipes.pop(pipe)
                try:
                    found[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    found[rank] = False, self._ranks[rank].end()
                if not found[rank][0]:
                    end = min(end, time.monotonic() + GRACE)
        return found


@cache
def meeting_place() -> "dist.TCPStore":
    """Where ranks find each other; through a file, eight ranks with many groups spend most of their time on it."""
    import torch.distributed as dist

    return dist.TCPStore(HERE, 0, is_master=True, wait_for_workers=False)


def _serve(pipe: Connection, backend: str, stderr: Path) -> None:
    """Do what is asked until nobody asks any more; what is said on stderr, a signal's traceback too, is in a file."""
    with stderr.open("ab") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    faulthandler.enable()

    import torch
    import torch.distributed as dist

    from pentode.dist import gloo

    backend = gloo.register() if backend == "gloo" else backend
    torch.set_num_threads(1)
    gc.freeze()
    modules: dict[str, Any] = {}
    while True:
        try:
            source, name, rank, ranks, (port, call), arguments = pipe.recv()
        except EOFError:
            return
        try:
            if source not in modules:
                modules[source] = (
                    _from_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
                )
            own = torch.device("cuda", rank) if backend == "nccl" else None
            store = dist.PrefixStore(call, dist.TCPStore(HERE, port, is_master=False))
            dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, device_id=own)
            faulthandler.dump_traceback_later(SILENCE)
            pipe.send((True, getattr(modules[source], name)(**arguments)))
        except BaseException:  # noqa: BLE001
            pipe.send((False, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # a group that stands in a cycle keeps its threads and sockets


def _from_file(path: Path) -> ModuleType:
    """A module by its file, under the name that pickled things of it ask for."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WORLD = World()
atexit.register(WORLD.close)
