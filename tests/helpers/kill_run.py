"""Runs a command again and again, killing it with SIGKILL at chosen or random instants, until it completes.

Each attempt is a process forked from a server that has imported torch, so that an attempt costs what the training
costs. Nothing here sleeps: an instant is a time limit on waiting for the process to end, and a save is noticed by
looking for its temporary folder without a pause.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

STUCK = 120.0  # seconds after which a run that should end is taken for hung

multiprocessing.set_forkserver_preload(["tests.helpers.warm"])

Target = Callable[..., object]  # a function at module level; its exit is the command's


def pentode(*arguments: str) -> None:
    """`python -m pentode`, as a target."""
    from pentode.cli import main

    main(list(arguments))


@dataclass
class Command:
    """A way to train in a folder `root`, or to go on there: `target(*arguments_of(root))`.

    What its processes print goes to `root`.log beside the folder.
    """

    target: Target
    arguments_of: Callable[[Path], Sequence[object]]

    def start(self, root: Path) -> BaseProcess:
        context = multiprocessing.get_context("forkserver")
        log = root.with_name(root.name + ".log")
        process = context.Process(target=_child, args=(self.target, tuple(self.arguments_of(root)), log))
        process.start()
        return process

    def run(self, root: Path) -> int:
        """Start it and wait for its end; its exit code."""
        return exit_code(self.start(root))


@dataclass
class Campaign:
    """What killing did: kills in all, those that left a half-made checkpoint, and the runs that completed."""

    kills: int = 0
    in_a_save: int = 0
    completed: list[Path] = field(default_factory=list)


def kill_again_and_again(command: Command, folder: Path, *, kills: int, in_a_save: int, seed: int) -> Campaign:
    """Make runs in `folder`, killing each several times, until both counts are reached and the last run is complete.

    Every other kill waits for a save. A process that ends by itself with an error fails the test at once.
    """
    draw, campaign = random.Random(seed), Campaign()
    started = time.monotonic()
    assert command.run(folder / "timing") == 0
    duration = time.monotonic() - started
    while campaign.kills < kills or campaign.in_a_save < in_a_save:
        assert campaign.kills < 5 * kills, f"only {campaign.in_a_save} of {campaign.kills} kills hit a save"
        root = folder / f"run-{len(campaign.completed)}"
        for attempt in range(kills + 1):
            before = temporary_folders(root)
            process = command.start(root)
            if attempt < kills and (campaign.kills < kills or campaign.in_a_save < in_a_save):
                if campaign.kills % 2:
                    wait_for_a_save(process, root, skip=draw.randrange(3), before=before)
                else:
                    process.join(draw.uniform(0.0, duration))
                process.kill()
            code = exit_code(process)
            if code == 0:
                break
            assert code == -signal.SIGKILL, f"{root} ended with {code}:\n{output(root)}"
            campaign.kills += 1
            campaign.in_a_save += bool(temporary_folders(root) - before)
        campaign.completed.append(root)
    return campaign


def exit_code(process: BaseProcess) -> int:
    """Wait for a process's end; minus the signal's number if one ended it."""
    process.join(STUCK)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"a process did not end in {STUCK:.0f} s")
    return process.exitcode


def wait_for_a_save(process: BaseProcess, root: Path, *, skip: int = 0, before: frozenset[str] = frozenset()) -> None:
    """Return when a checkpoint is being made in `root`, after `skip` others, or when the process has ended."""
    seen: set[str] = set()
    while process.is_alive():
        seen |= temporary_folders(root) - before
        if len(seen) > skip:
            return


def temporary_folders(root: Path) -> frozenset[str]:
    """The names of checkpoints that are being made, or that were when their process died."""
    try:
        return frozenset(name for name in os.listdir(root) if name.startswith(".tmp-") and "latest" not in name)
    except FileNotFoundError:
        return frozenset()


def final_files(root: Path, pattern: str = "weights-*.safetensors") -> dict[str, bytes]:
    """The bytes of the newest checkpoint's tensor files."""
    newest = max((int(name) for name in os.listdir(root) if name.isdigit()), default=None)
    assert newest is not None, f"{root} holds no checkpoint:\n{output(root)}"
    return {path.name: path.read_bytes() for path in sorted((root / str(newest)).glob(pattern))}


def output(root: Path) -> str:
    """What a run's processes printed."""
    log = root.with_name(root.name + ".log")
    return log.read_text(errors="replace") if log.exists() else ""


def _child(target: Target, arguments: tuple[object, ...], log: Path) -> None:
    import torch

    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    target(*arguments)
