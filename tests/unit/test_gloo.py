"""A process group of CPUs has one thread for its collectives: two, as torch makes them, can corrupt the heap."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pentode.dist import gloo
from tests.helpers.world import WORLD


def threads() -> int:
    """How many of this process's threads carry out collectives."""
    return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")].count("pt_gloo_runloop\n")


def groups_and_threads() -> tuple[list[str], int, int]:
    """The backends of three groups, one at named interfaces, how many threads each has; and the sum of ranks."""
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


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_group_has_one_thread() -> None:
    assert WORLD.run(groups_and_threads, 2) == [([gloo.NAME] * 3, 3, 2**3)] * 2


def test_a_torch_without_options_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gloo.register() == gloo.register() == gloo.NAME
    monkeypatch.delattr(dist.ProcessGroupGloo, "_Options")
    assert gloo.register() == "gloo"
