"""benchmark_csv_path: one row for a whole run, in a file that many runs share."""

import csv
import fcntl
import io
from bisect import bisect
from collections import deque
from pathlib import Path
from statistics import median
from typing import cast

from pentode import log
from pentode.metrics.record import Record

# Kenotron's columns, less Bandwidth (GB/s), which it always wrote as 0.
COLUMNS = (
    "job_id",
    "name",
    "nodes",
    "seq_len",
    "mbs",
    "batch_accum",
    "gbs",
    "mTFLOPs",
    "hTFLOPs",
    "tok/s/gpu",
    "Mem Alloc (GB)",
    "Mem Res (GB)",
)
WARM_UP = 2  # steps that compile, or fill caches; they count only in a run that has no others
WINDOW = 1000  # records that medians are taken over; a long run's list must not grow
GIGABYTE = 1024**3


class BenchmarkCsv:
    """Appends the run's row when the run closes; a run without a step leaves no row. Speeds are medians."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info: dict[str, object] = {}
        self.records: deque[Record] = deque(maxlen=WINDOW)

    def start(self, info: dict[str, object]) -> None:
        self.info = info

    def log(self, record: Record) -> None:
        self.records.append(record)

    def close(self, status: str) -> None:
        if not self.records:
            return
        measured = list(self.records)[WARM_UP:] or list(self.records)
        last = self.records[-1]
        lengths = cast("dict[int, int]", self.info.get("sequence_lengths", {}))
        row = {
            "project": log.printable(str(self.info.get("project", ""))),  # for a file whose columns ask for it
            "job_id": self.info.get("job_id", ""),
            "name": log.printable(str(self.info.get("run", ""))),
            "nodes": self.info.get("nodes", 1),
            "seq_len": _lengths(lengths, [r.step for r in measured]),
            "mbs": self.info.get("micro_batch_size", ""),
            "batch_accum": self.info.get("batch_accumulation_per_replica", ""),
            "gbs": last.global_batch_size,
            "mTFLOPs": _median([r.model_tflops_per_gpu for r in measured]),
            "hTFLOPs": _median([r.hardware_tflops_per_gpu for r in measured]),
            "tok/s/gpu": _median([r.tokens_per_sec_per_gpu for r in measured]),
            "Mem Alloc (GB)": _gigabytes(last.cuda_memory_allocated),
            "Mem Res (GB)": _gigabytes(last.cuda_max_memory_reserved),
        }
        append(self.path, row)


def append(path: Path, row: dict[str, object]) -> None:
    """Add `row` under the columns that the file has, ours if it is new; runs that end together wait for each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        header = next(csv.reader([file.readline()]), [])
        file.seek(0, io.SEEK_END)
        writer = csv.DictWriter(file, header or COLUMNS, restval="", extrasaction="ignore")
        if not header:
            writer.writeheader()
        writer.writerow(row)


def _lengths(by_first_step: dict[int, int], steps: list[int]) -> str:
    """The sequence lengths that `steps` had, in the order in which they came: 256, or 256+1024."""
    starts = sorted(by_first_step)
    had = (by_first_step[starts[bisect(starts, step) - 1]] for step in steps if starts and step >= starts[0])
    return "+".join(str(length) for length in dict.fromkeys(had))


def _median(values: list[float | None]) -> float | str:
    known = [value for value in values if value is not None]
    return round(median(known), 6) if known else ""


def _gigabytes(size: int | None) -> float | str:
    return "" if size is None else round(size / GIGABYTE, 3)
