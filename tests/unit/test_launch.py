"""Which process this is, from torchrun's or Slurm's variables; and joining the others with Slurm's alone."""

import os
import signal
import socket
import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from pentode.dist import launch
from pentode.dist.launch import PORTS, World, expand_hosts, start_local, world
from pentode.errors import ConfigError
from tests.helpers.source import ROOT

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "node[03-04]"}
OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def set_only(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Of the variables that launchers set, these."""
    for name in list(os.environ):
        if name in OURS or name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "here"),
    [
        ({}, World()),
        (TORCHRUN, World(3, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, World()),
        (SRUN | TORCHRUN | {"RANK": "2"}, World(2, 4, 1)),  # torchrun in an srun
        (BATCH_SCRIPT, World()),
        (SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}, World()),
        (SRUN | {"MASTER_PORT": "5"}, World(3, 4, 1, "tcp://node03:5")),
        (SRUN | {"MASTER_ADDR": "here", "MASTER_PORT": "5"}, World(3, 4, 1, "tcp://here:5")),
        (
            without(SRUN, "SLURM_STEP_NODELIST") | {"SLURM_JOB_NODELIST": "b,a", "MASTER_PORT": "5"},
            World(3, 4, 1, "tcp://b:5"),
        ),
    ],
)
def test_torchrun_comes_before_slurm_and_one_task_is_alone(
    variables: dict[str, str], here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_only(monkeypatch, variables)
    assert world() == here


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        (
            {"RANK": "1"},
            "launch: RANK=1 without WORLD_SIZE and LOCAL_RANK; torchrun sets all of them, and nothing does for a "
            "process alone",
        ),
        (without(TORCHRUN, "RANK"), "launch: WORLD_SIZE=4 and LOCAL_RANK=1 without RANK; torchrun sets all of them"),
        (TORCHRUN | {"RANK": "one"}, "launch: RANK='one' is not a number"),
        (TORCHRUN | {"WORLD_SIZE": "-1"}, "launch: WORLD_SIZE='-1' is not a number"),
        (TORCHRUN | {"RANK": "4"}, "launch: rank 4 of 4 processes; ranks count from 0"),
        (without(TORCHRUN, "MASTER_PORT"), "launch: WORLD_SIZE=4 without MASTER_PORT; start with torchrun"),
        (
            without(SRUN, "SLURM_PROCID"),
            "launch: SLURM_STEP_NUM_TASKS=4 and SLURM_LOCALID=1 without SLURM_PROCID; srun",
        ),
        (SRUN | {"SLURM_LOCALID": ""}, "launch: SLURM_LOCALID='' is not a number"),
        (SRUN | {"MASTER_PORT": "x"}, "launch: MASTER_PORT='x' is not a number"),
        (
            SRUN | {"SLURM_STEP_NODELIST": "node[03-"},
            "launch: SLURM_STEP_NODELIST='node[03-' is not a list of hosts; set MASTER_ADDR",
        ),
        (
            without(SRUN, "SLURM_STEP_NODELIST"),
            "launch: no SLURM_STEP_NODELIST to find the first host in; set MASTER_ADDR",
        ),
    ],
)
def test_variables_that_make_no_sense_are_refused(
    variables: dict[str, str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_only(monkeypatch, variables)
    with pytest.raises(ConfigError) as error:
        world()
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith(problem)


def test_all_tasks_of_a_step_take_one_port_and_other_steps_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def port(**variables: str) -> int:
        set_only(monkeypatch, SRUN | variables)
        return int(world().meeting.rpartition(":")[2])

    assert port(SLURM_PROCID="0", SLURM_LOCALID="0") == port()
    steps = [port(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step)) for job in range(70, 75) for step in range(20)]
    assert len(set(steps)) == len(steps)
    assert set(steps) <= set(PORTS)
    assert min(PORTS) >= 20000
    assert max(PORTS) <= 60000


@pytest.mark.parametrize(
    ("names", "hosts"),
    [
        ("gpu7", ["gpu7"]),
        ("node[03-05,9],gpu7", ["node03", "node04", "node05", "node9", "gpu7"]),
        ("a-b.c.org,n[098-101]", ["a-b.c.org", "n098", "n099", "n100", "n101"]),
        ("r[1-2]n[08-09]-ib", ["r1n08-ib", "r1n09-ib", "r2n08-ib", "r2n09-ib"]),
        ("", []),
        ("a,,b", []),
        ("a,node[1-", []),
        ("node[]", []),
        ("node[x]", []),
        ("node[1,]", []),
        ("node[-3]", []),
        ("a b", []),
    ],
)
def test_slurms_short_form_of_hosts(names: str, hosts: list[str]) -> None:
    assert expand_hosts(names) == hosts


@pytest.mark.parametrize(
    ("processes", "cores", "set_by_user", "threads"),
    [(2, 8, None, "4"), (3, 8, None, "2"), (8, 2, None, "1"), (2, 8, "7", "7")],
)
def test_local_processes_share_the_cores_unless_the_user_says_otherwise(
    processes: int, cores: int, set_by_user: str | None, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.setenv("OMP_NUM_THREADS", set_by_user or "")
    if set_by_user is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(launch, "elastic_launch", lambda *_: lambda *_: found.append(os.environ["OMP_NUM_THREADS"]))
    assert start_local(processes, []) == 0
    assert found == [threads]


@pytest.mark.parametrize(
    ("exitcode", "code", "said"),
    [
        (74, 74, ""),
        (
            -9,
            70,
            "pentode: rank 1 was ended by SIGKILL, which a host that runs out of memory sends; the same command goes ",
        ),
        (-11, 70, "pentode: rank 1 was ended by SIGSEGV; the same command goes on from the newest checkpoint\n"),
    ],
)
def test_a_rank_that_a_signal_ended_is_named(
    exitcode: int, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = ProcessFailure(local_rank=1, pid=99999, exitcode=exitcode, error_file="none")

    def failed(*_: str) -> None:
        raise ChildFailedError("pentode", {1: failure})

    monkeypatch.setattr(launch, "elastic_launch", lambda *_: failed)
    assert start_local(2, []) == code
    printed = capsys.readouterr().err
    assert printed.startswith(said)
    assert printed.count("\n") == (1 if said else 0)


def test_a_second_sigusr1_does_not_end_the_launcher_before_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    passed_on: list[int] = []

    def launched(*_: str) -> None:
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        except SignalException as stopped:  # as torch's does
            passed_on.append(stopped.sigval)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGUSR1)
            passed_on.append(0)  # all have ended
            raise

    monkeypatch.setattr(launch, "elastic_launch", lambda *_: launched)
    before = signal.getsignal(signal.SIGUSR1)
    assert start_local(2, []) == 75
    assert passed_on == [signal.SIGUSR1, 0]
    assert signal.getsignal(signal.SIGUSR1) is before


JOIN = """
import torch, torch.distributed as dist
from pentode.dist import gloo, launch
here = launch.world()
launch.connect(here, backend="gloo", device=torch.device("cpu"))
assert dist.get_backend() == gloo.NAME
total = torch.tensor([10.0**here.rank])
dist.all_reduce(total)
print(here.rank, here.local_rank, int(total))
launch.disconnect()
"""


def test_two_processes_meet_with_slurms_variables_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "7"}
    set_only(monkeypatch, step | {"MASTER_PORT": str(port)})
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN],
            env=os.environ | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        assert [task.communicate(timeout=60)[0] for task in tasks] == ["0 0 11\n", "1 1 11\n"]
    finally:
        for task in tasks:
            task.kill()
            task.wait()
