"""Runs a command in a process forked from a server that has imported torch, so that it costs what the training costs.

Whoever starts it may kill it. Nothing here sleeps.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

STUCK = 120.0  # seconds after which a run that should end is taken for hung

multiprocessing.set_forkserver_preload(["tests.helpers.warm"])

Target = Callable[..., object]  # a function at module level; its exit is the command's


def pentode(*arguments: str) -> None:
    """`python -m pentode`, as a target."""
    from pentode.cli import main

    main(list(arguments))


def task(arguments: Sequence[str], environment: Mapping[str, str], folder: Path, *, stderr: Path) -> None:
    """`python -m pentode`, with this environment, in this folder; what it prints goes nowhere, and its errors there."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for file, descriptor in ((os.devnull, 1), (stderr, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), descriptor)
    pentode(*arguments)


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


def exit_code(process: BaseProcess) -> int:
    """Wait for a process's end; minus the signal's number if one ended it."""
    process.join(STUCK)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"a process did not end in {STUCK:.0f} s")
    return process.exitcode


def _child(target: Target, arguments: tuple[object, ...], log: Path) -> None:
    import torch

    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    target(*arguments)
