"""How many processes a run has and which one this is, from torchrun or alone; and starting them."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pentode.errors import INTERNAL, ConfigError, Interrupted, Preempted

TIMEOUT = timedelta(minutes=20)  # Nanotron's; a rank that writes a large cache alone may take long


@dataclass(frozen=True)
class World:
    """This process among all of the run's: `local_rank` counts within the host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # as torchrun sets them


def world() -> World:
    """Where this process stands, from the environment that torchrun set; alone otherwise."""
    if not all(name in os.environ for name in VARIABLES):
        return World()
    values = {name: os.environ[name] for name in VARIABLES}
    odd = [f"launch: {name}={value!r} is not a number" for name, value in values.items() if not value.isdigit()]
    if odd:
        raise ConfigError(odd)
    return World(*(int(value) for value in values.values()))


def connect(here: World, *, backend: str, device: torch.device) -> None:
    """Join the run's other processes; nothing to do alone."""
    if here.size > 1 and not dist.is_initialized():
        own = device if device.index is not None else None  # a GPU of its own, which NCCL wants to know at once
        dist.init_process_group(backend, rank=here.rank, world_size=here.size, timeout=TIMEOUT, device_id=own)


def disconnect() -> None:
    """Leave the others in order."""
    if dist.is_initialized():
        dist.destroy_process_group()


def start_local(processes: int, arguments: Sequence[str]) -> int:
    """Run `python -m pentode ARGUMENTS` in `processes` local processes, with torch's elastic launcher.

    Returns the exit code of the first process that failed, or 0. A signal is passed on to all of them, and its code
    returned once they have saved and ended.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes say what went wrong
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="pentode",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "pentode", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else INTERNAL
    except SignalException as stopped:
        return Interrupted.exit_code if stopped.sigval == signal.SIGINT else Preempted.exit_code
    return 0
