"""How many processes a run has and which one this is, from torchrun, Slurm or alone; and starting them."""

import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import product
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pentode.dist import gloo, symmetric
from pentode.dist.board import wait_for
from pentode.dist.leaving import raise_if_one_left
from pentode.dist.together import ranks_in_words, tell_once
from pentode.errors import INTERNAL, ConfigError, Interrupted, Preempted, on_all_ranks

TIMEOUT = timedelta(minutes=20)  # Nanotron's; a rank that writes a large cache alone may take long


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")  # srun's; a batch script alone has no SLURM_STEP_...
PORTS = range(20000, 32768)  # from there on, Linux gives ports to whoever asks for any


@dataclass(frozen=True)
class World:
    """This process among all of the run's.

    local_rank  counts within the host
    meeting     where they find each other; "env://" is MASTER_ADDR and MASTER_PORT, as torchrun sets them
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    meeting: str = "env://"


def world() -> World:
    """Where this process stands, from the environment that torchrun or else Slurm's srun set; alone otherwise."""
    env = os.environ
    if "RANK" in env or "WORLD_SIZE" in env:
        here = _world(*_numbers(TORCHRUN, by="torchrun"))
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
        if here.size > 1 and missing:
            raise ConfigError([f"launch: WORLD_SIZE={here.size} without {' and '.join(missing)}; start with torchrun"])
        return here
    if "SLURM_STEP_NUM_TASKS" in env:
        here = _world(*_numbers(SLURM, by="srun"))
        return replace(here, meeting=f"tcp://{_address()}:{_port()}") if here.size > 1 else here
    return World()


def _world(rank: int, size: int, local_rank: int) -> World:
    if rank >= size:
        raise ConfigError([f"launch: rank {rank} of {size} processes; ranks count from 0"])
    return World(rank, size, local_rank)


def _numbers(names: Sequence[str], *, by: str) -> list[int]:
    """The values of these variables, which `by` sets together."""
    given = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    missing = [name for name in names if name not in os.environ]
    if missing:
        together = f"{' and '.join(given)} without {' and '.join(missing)}"
        raise ConfigError([f"launch: {together}; {by} sets all of them, and nothing does for a process alone"])
    return [_number(name) for name in names]


def _number(name: str) -> int:
    value = os.environ[name]
    if not (value.isascii() and value.isdigit()):
        raise ConfigError([f"launch: {name}={value!r} is not a number"])
    return int(value)


def _address() -> str:
    """The host of a Slurm step's first task."""
    if "MASTER_ADDR" in os.environ:
        return os.environ["MASTER_ADDR"]
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        if name in os.environ:
            found = expand_hosts(os.environ[name])
            if not found:
                raise ConfigError([f"launch: {name}={os.environ[name]!r} is not a list of hosts; set MASTER_ADDR"])
            return found[0]
    raise ConfigError(["launch: no SLURM_STEP_NODELIST to find the first host in; set MASTER_ADDR"])


def _port() -> int:
    """A port that all processes of a Slurm step take, and those of other jobs and steps rarely do."""
    if "MASTER_PORT" in os.environ:
        return _number("MASTER_PORT")
    job, step = (_number(name) if name in os.environ else 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return PORTS[(1009 * job + step) % len(PORTS)]  # a prime, so that the steps of a job do not meet the next job's


def expand_hosts(names: str) -> list[str]:
    """The hosts that Slurm's short form names: node03, node04, gpu7 for "node[03-04],gpu7"; none if it is malformed."""
    found: list[str] = []
    for word in re.split(r",(?![^\[]*\])", names):  # at commas outside of brackets
        parts = re.split(r"\[([\d,-]+)\]", word)  # text and brackets in turn
        if not word or re.search(r"[^\w.-]", "".join(parts[::2])):
            return []
        found += map("".join, product(*([part] if i % 2 == 0 else _counted(part) for i, part in enumerate(parts))))
    return found


def _counted(ranges: str) -> list[str]:
    """The numbers in a bracket, "03-05,9", with their leading zeros."""
    found: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            return []
        found += (f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1))
    return found


def meet(here: World) -> dist.Store | None:
    """Find the run's other processes, without a device yet: the store that all of them see; None alone."""
    if here.size == 1:
        return None
    store, _, _ = next(dist.rendezvous(here.meeting, rank=here.rank, world_size=here.size, timeout=TIMEOUT))
    store.set_timeout(TIMEOUT)
    return dist.PrefixStore("pentode", store)


def refuse(problems: Sequence[str], here: World, *, store: dist.Store | None) -> None:
    """Raise the same ConfigError on every rank if any has problems, which is told once; all call, each with its own.

    A rank whose config is wrong knows no device to communicate with, and the others must not wait for it: `store`,
    which `meet` gave, is all that this needs.
    """
    if store is None:
        if problems:
            raise ConfigError(problems)
        return
    store.set(f"problems of {here.rank}", json.dumps(list(problems)))
    if here.rank == 0:  # reads them for all: a thousand ranks would ask a million times
        own = [f"problems of {rank}" for rank in range(here.size)]
        _wait(store, own)
        ranks = [json.loads(store.get(key)) for key in own]
        holders: dict[str, list[int]] = {}
        for rank, problem in ((rank, problem) for rank, own in enumerate(ranks) for problem in own):
            holders.setdefault(problem, []).append(rank)
        told = [
            problem if len(numbers) == here.size else f"{ranks_in_words(numbers)}: {problem}"
            for problem, numbers in holders.items()
        ]
        store.set("problems", json.dumps(told))
    _wait(store, ["problems"])
    found = json.loads(store.get("problems"))
    if found:
        error = on_all_ranks(ConfigError(found))
        tell_once(error, rank=here.rank, wait_for_all=lambda: _wait_for_all(here, store))
        raise error


def connect(here: World, *, backend: str, device: torch.device, store: dist.Store | None = None) -> None:
    """Join the run's other processes, at `store` if they have met; nothing to do alone."""
    if here.size > 1 and not dist.is_initialized():
        own = device if device.index is not None else None  # a GPU of its own, which NCCL wants to know at once
        dist.init_process_group(
            gloo.register() if backend == "gloo" else backend,
            store=store or meet(here),
            rank=here.rank,
            world_size=here.size,
            timeout=TIMEOUT,
            device_id=own,
        )


def _wait_for_all(here: World, store: dist.Store) -> None:
    """Return when all ranks have come here; on the first one, which may hold the store, when all others know it."""
    if here.rank == 0:
        store.set("leave", "")
        _wait(store, [f"{rank} leaves" for rank in range(1, here.size)])
    else:
        _wait(store, ["leave"])
        store.set(f"{here.rank} leaves", "")


def _wait(store: dist.Store, keys: list[str]) -> None:
    late = f"launch: another rank has not come in {TIMEOUT.total_seconds():.0f} s; see what that one, or its host, says"
    wait_for(store, keys, late=late, look=lambda: raise_if_one_left(store))


def disconnect() -> None:
    """Leave the others in order."""
    if dist.is_initialized():
        symmetric.forget()
        dist.destroy_process_group()


def threads_each(processes: int) -> int:
    """How many threads a process may compute with where so many share the cores that this one may use."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def _ended_by(rank: int, number: int) -> str:
    """What to say of a rank that a signal ended."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    why = ", which a host that runs out of memory sends" if number == signal.SIGKILL else ""
    return f"rank {rank} was ended by {name}{why}; the same command goes on from the newest checkpoint"


@contextmanager
def _usr1_passed_on() -> Iterator[None]:
    """SIGUSR1, of which torch's launcher knows nothing, ends it as its own signals do: the first asks all processes to.

    Another adds nothing: raised while the launcher waits for them, it would end it before they have saved.
    """
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if not asked:
            asked.append(number)
            raise SignalException("SIGUSR1", sigval=signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def start_local(processes: int, arguments: Sequence[str]) -> int:
    """Run `python -m pentode ARGUMENTS` in `processes` local processes, with torch's elastic launcher.

    Returns the exit code of the first process that failed, or 0; says which one a signal ended. A signal to this one is
    passed on to all of them, and its code returned once they have saved and ended.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes say what went wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_each(processes)))  # each would take all cores
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
        with _usr1_passed_on():
            elastic_launch(config, sys.executable)("-m", "pentode", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it could not say so itself
            print(f"pentode: {_ended_by(rank, -failure.exitcode)}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else INTERNAL
    except SignalException as stopped:
        return Interrupted.exit_code if stopped.sigval == signal.SIGINT else Preempted.exit_code
    return 0
