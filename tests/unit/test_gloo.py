"""A process group of CPUs has one thread for its collectives: two, as torch makes them, can corrupt the heap."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pentode.dist import gloo
from tests.helpers.source import ROOT
from tests.helpers.world import WORLD


def threads() -> int:
    """How many of this process's threads carry out collectives."""
    return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")].count("pt_gloo_runloop\n")


def groups_and_threads() -> tuple[list[str], int, int]:
    """The backends of three groups, one of them at two interfaces; their threads; what they summed up."""
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)  # a thread has its name once it has done something
    before = threads()
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo,lo"
    try:
        groups.append(dist.new_group([0, 1]))
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]
    for group in groups:
        dist.all_reduce(total, group=group)
    return [dist.get_backend(group) for group in groups], threads() - before, int(total)


def options_of_groups() -> tuple[timedelta, str]:
    """How long a group waits that was told so, and what is said of an interface that is not there."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=601.5))
    timeout = group._get_backend(torch.device("cpu")).options._timeout
    os.environ["GLOO_SOCKET_IFNAME"] = "nosuch0"
    try:
        dist.new_group([0, 1])
    except RuntimeError as error:
        return timeout, str(error)
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]
    return timeout, "nothing"


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_group_has_one_thread() -> None:
    assert WORLD.run(groups_and_threads, 2) == [([gloo.NAME] * 3, 3, 2**3)] * 2


def test_groups_have_torchs_options() -> None:
    for timeout, said in WORLD.run(options_of_groups, 2):
        assert timeout == timedelta(seconds=601.5)
        assert "nosuch0" in said


MANY = """
import torch
import torch.distributed as dist
from pentode.dist import gloo

dist.init_process_group(gloo.register(), store=dist.HashStore(), rank=0, world_size=1)
group, x = dist.group.WORLD.group_name, torch.ones(4)
gather, wait = torch.ops._c10d_functional.all_gather_into_tensor, torch.ops._c10d_functional.wait_tensor
for _ in range(2000):
    for one in [gather(x, 1, group) for _ in range(64)]:
        wait(one)
"""


def test_many_collectives_at_a_time_end_no_process() -> None:
    done = subprocess.run([sys.executable, "-c", MANY], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_torch_without_options_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gloo.register() == gloo.register() == gloo.NAME
    monkeypatch.delattr(dist.ProcessGroupGloo, "_Options")
    assert gloo.register() == "gloo"
