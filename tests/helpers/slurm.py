"""Starts the tasks of a Slurm step, as srun does, on this host alone."""

import multiprocessing
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.kill_run import exit_code, task
from tests.helpers.source import ROOT


def environments(tasks: int) -> list[dict[str, str]]:
    """The environments of a step's tasks, on a host without GPUs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    usual |= {"SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port)}
    usual |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return [usual | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(tasks)]


def forked_for_slurm(file: Path, *words: Sequence[str], folders: Sequence[Path] = ()) -> tuple[list[int], str]:
    """`pentode train` with the words of each rank: exit codes, and all that was said on stderr.

    Forked from a server that has imported torch. Each works in its folder of `folders`, or all of them at the root.
    """
    context, found, own = multiprocessing.get_context("forkserver"), file.parent, environments(len(words))
    ranks = [
        context.Process(
            target=task,
            args=(["train", str(file), *asked], own[rank], folders[rank] if folders else ROOT),
            kwargs={"stderr": found / f"stderr-{rank}"},
        )
        for rank, asked in enumerate(words)
    ]
    for rank in ranks:
        rank.start()
    codes = [exit_code(rank) for rank in ranks]
    return codes, "".join((found / f"stderr-{rank}").read_text() for rank in range(len(ranks)))
