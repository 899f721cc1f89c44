"""Where records go: the sinks that a config asks for, none of which may stop a run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pentode import log
from pentode.metrics.console import Console
from pentode.metrics.csv import BenchmarkCsv
from pentode.metrics.jsonl import JsonLines
from pentode.metrics.record import Record

if TYPE_CHECKING:
    from pentode.config.schema import Config


class Sink(Protocol):
    """Something that keeps or shows records."""

    def start(self, info: dict[str, object]) -> None: ...

    def log(self, record: Record) -> None: ...

    def close(self, status: str) -> None: ...


class Sinks:
    """Hands each record to all sinks; one that raises is switched off with one warning, and the run goes on."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)

    def start(self, info: dict[str, object]) -> None:
        self._each("start", info)

    def log(self, record: Record) -> None:
        self._each("log", record)

    def close(self, status: str) -> None:
        """`status` says how the run ended. Closing twice closes once.

        done     all its steps are done
        stopped  a signal ended it
        failed   an error ended it
        closed   the caller does not tell these apart
        """
        self._each("close", status)
        self.sinks = []

    def _each(self, method: str, argument: object) -> None:
        for sink in list(self.sinks):
            try:
                getattr(sink, method)(argument)
            except Exception as error:  # noqa: BLE001 - a full disk must not end a training run
                self.sinks.remove(sink)
                name = type(sink).__name__
                log.warning(f"metrics: {name} is switched off, training goes on ({type(error).__name__}: {error})")


def open_sinks(config: "Config", *, run: str, resume_step: int = 0) -> Sinks:
    """The started sinks of the run named `run`: console, metrics.jsonl in its folder, the benchmark CSV if named."""
    sinks: list[Sink] = [
        Console(train_steps=config.tokens.train_steps, interval=config.logging.iteration_step_info_interval),
        JsonLines(config.checkpoints.folder, resume_step=resume_step),
    ]
    if config.general.benchmark_csv_path is not None:
        sinks.append(BenchmarkCsv(Path(config.general.benchmark_csv_path)))
    opened = Sinks(sinks)
    opened.start(
        {
            "project": config.general.project,
            "run": run,
            "job_id": os.environ.get("SLURM_JOB_ID", ""),
            "nodes": int(os.environ.get("GROUP_WORLD_SIZE", "1")),  # torchrun's word for the number of nodes
            "sequence_lengths": {  # by the first step that has it
                stage.start_training_step: stage.sequence_length or config.tokens.sequence_length
                for stage in config.data_stages
            },
            "micro_batch_size": config.tokens.micro_batch_size,
            "batch_accumulation_per_replica": config.tokens.batch_accumulation_per_replica,
        }
    )
    return opened
