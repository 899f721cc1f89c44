"""metrics.jsonl: one JSON object a line, a line a step, exact; and how a resumed run goes on with it."""

import json
import os
from pathlib import Path
from typing import TextIO

from pentode.metrics.record import Record

NAME = "metrics.jsonl"
ENCODE = json.JSONEncoder(allow_nan=False).encode  # made once: json.dumps makes one a call
NOT_EVALUATED = b'"val_loss": null'

Row = dict[str, float | int | None]


class JsonLines:
    """Appends records to `folder`/metrics.jsonl; each is with the operating system before the next step begins.

    `resume_step` is the step that the run goes on from, 0 for a new one. What a former process wrote beyond it is
    moved to `metrics.<resume_step>.jsonl.old`, and so are torn lines.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        self.path = folder / NAME
        self.resume_step = resume_step
        self.file: TextIO | None = None

    def start(self, info: dict[str, object]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            cut_back(self.path, self.resume_step)
        self.file = self.path.open("a", encoding="utf-8")

    def log(self, record: Record) -> None:
        assert self.file is not None, "log() before start()"
        self.file.write(ENCODE(record.row()) + "\n")
        self.file.flush()

    def close(self, status: str) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def read_rows(path: Path, *, most: int | None = None) -> list[Row]:
    """The rows of a metrics.jsonl, [] if there is none; lines that a crash left torn are passed over.

    `most`: of a longer file read only about so many, evenly spread, and all that have a validation loss.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    if most is not None and len(lines) > most:
        stride = -(-len(lines) // most)
        newest = (len(lines) - 1) % stride  # the newest row is one of the chosen
        lines = [line for i, line in enumerate(lines) if i % stride == newest or NOT_EVALUATED not in line]
    rows = (_parse(line) for line in lines)
    return [row for row in rows if row is not None]


def cut_back(path: Path, step: int) -> None:
    """Keep the rows up to `step`, in order; append all other lines to `metrics.<step>.jsonl.old` beside `path`.

    A file that is whole and ends at `step` or before is not touched. The new file takes the old one's place at once.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    keep, aside = [], []
    for line in lines:
        row = _parse(line) if line.endswith(b"\n") else None
        (keep if row is not None and (row["step"] or 0) <= step else aside).append(line)
    if not aside:
        return
    old = path.with_name(f"{path.stem}.{step}{path.suffix}.old")
    with old.open("ab") as file:
        file.writelines(line if line.endswith(b"\n") else line + b"\n" for line in aside)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.writelines(keep)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:  # also what is not UTF-8
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
