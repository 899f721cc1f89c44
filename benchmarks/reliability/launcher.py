"""`pentode train --nproc N`: torch's launcher itself, whose ranks are forked from it and need import nothing."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.reliability.ranks import Prepare, Ranks


def start(arguments: Sequence[str], *, output: Path, world: int, prepare: Prepare) -> Ranks:
    """Start `pentode ARGUMENTS --nproc WORLD`: one process, the launcher; `prepare` is for the ranks that it starts."""
    before = [*Ranks.everywhere, prepare]

    def fork_ranks(_: int) -> None:
        import pentode.dist.launch

        pentode.dist.launch.elastic_launch = lambda config, program: _Forking(config, before)

    return Ranks([*arguments, "--nproc", str(world)], output=output, world=1, prepare=fork_ranks, everywhere=False)


def ranks_of(launcher: int) -> list[int]:
    """The processes that a launcher has started and that have not ended, as Linux tells."""
    try:
        tasks = list(Path(f"/proc/{launcher}/task").iterdir())
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    except OSError:  # it has ended
        return []


def signal_to(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


class _Forking:
    """torch's elastic launcher for `python -m pentode ARGUMENTS`, with the call in place of the program."""

    def __init__(self, config: LaunchConfig, prepare: Sequence[Prepare]) -> None:
        self.launch = elastic_launch(replace(config, start_method="fork"), _rank)
        self.prepare = list(prepare)

    def __call__(self, *arguments: str) -> Any:
        module, name, *rest = arguments
        assert (module, name) == ("-m", "pentode")
        return self.launch(self.prepare, rest)


def _rank(prepare: Sequence[Callable[[int], object]], arguments: Sequence[str]) -> None:
    from pentode.cli import run_command

    for each in prepare:
        each(int(os.environ["RANK"]))
    code = run_command(list(arguments))
    if code:
        sys.exit(code)
