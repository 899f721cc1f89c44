"""Runs a test's body on several gloo ranks, forked from a server that has already imported torch.

def body(*, sequence_parallel: bool) -> None: ...     # at module level; asserts on every rank
run_on_ranks(body, 2, sequence_parallel=True)         # any rank's failure fails the test
"""

import importlib.util
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from pentode.dist import gloo

multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "pytest", "hypothesis"])


def run_on_ranks(body: Callable[..., None], world_size: int, **arguments: object) -> None:
    """Call `body` on every rank of a new world; it is found again by its file and name."""
    source = Path(sys.modules[body.__module__].__file__)
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"
        torch.multiprocessing.start_processes(
            _rank_main,
            (source, body.__name__, world_size, rendezvous, arguments),
            nprocs=world_size,
            start_method="forkserver",
        )


def _rank_main(
    rank: int, source: Path, name: str, world_size: int, rendezvous: str, arguments: dict[str, object]
) -> None:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location(source.stem, source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[source.stem] = module
    spec.loader.exec_module(module)
    dist.init_process_group(gloo.register(), init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        getattr(module, name)(**arguments)
    finally:
        dist.destroy_process_group()
