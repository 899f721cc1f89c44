"""metrics.jsonl is exact, and goes on after a crash as if there had been none."""

import json
import math
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pentode.metrics.jsonl import JsonLines, cut_back, read_rows
from pentode.metrics.record import Record

FIRST_KEYS = [
    "step",
    "lm_loss",
    "val_loss",
    "grad_norm",
    "lr",
    "consumed_tokens",
    "global_batch_size",
    "tokens_per_sec",
    "tokens_per_sec_per_gpu",
    "model_tflops_per_gpu",
]


def a_record(step: int, *, loss: float | None = 1.5) -> Record:
    return Record(step=step, lm_loss=loss, consumed_tokens=step * 512, global_batch_size=2)


def write(folder: Path, *steps: int, resume_step: int = 0) -> None:
    sink = JsonLines(folder, resume_step=resume_step)
    sink.start({})
    for step in steps:
        sink.log(a_record(step))
    sink.close("done")


def steps(path: Path) -> list[object]:
    return [row["step"] for row in read_rows(path)]


def test_a_row_has_the_contracts_keys_in_order_and_null_for_the_unknown(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "a", 1)
    row = json.loads((tmp_path / "runs" / "a" / "metrics.jsonl").read_text())
    assert list(row)[: len(FIRST_KEYS)] == FIRST_KEYS
    assert "elapsed_time_per_iteration_ms" in row
    assert row["cuda_memory_allocated"] is None


@given(st.floats())
def test_numbers_come_back_exactly(loss: float) -> None:
    row = json.loads(json.dumps(a_record(1, loss=loss).row(), allow_nan=False))
    assert row["lm_loss"] == (loss if math.isfinite(loss) else None)


def test_a_row_is_on_its_way_before_the_next_step(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path)
    sink.start({})
    sink.log(a_record(1))
    assert steps(sink.path) == [1]
    sink.close("done")


def test_resuming_moves_the_rows_beyond_the_checkpoint_aside(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4)
    write(tmp_path, 3, 4, 5, resume_step=2)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]
    assert steps(tmp_path / "metrics.2.jsonl.old") == [3, 4]


def test_a_second_crash_at_the_same_place_loses_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    write(tmp_path, 2, resume_step=1)
    write(tmp_path, 2, 3, resume_step=1)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert steps(tmp_path / "metrics.1.jsonl.old") == [2, 3, 2]


def test_a_torn_last_line_is_passed_over_and_removed(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in (1, 20, len(whole) // 2 - 1):  # the last loses no more than the newline: it is torn all the same
        path.write_bytes(whole + whole[: len(whole) // 2][:cut])
        assert steps(path)[:2] == [1, 2]
        cut_back(path, 2)
        assert path.read_bytes() == whole


def test_rubbish_in_the_middle_hides_no_row(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\0\0\xff\n[]\n" + second)
    assert steps(path) == [1, 2]
    cut_back(path, 2)
    assert path.read_bytes() == first + second


def test_a_whole_file_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    before = (tmp_path / "metrics.jsonl").stat()
    write(tmp_path, resume_step=2)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before.st_ino
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_a_long_file_is_read_in_part_with_its_end_and_its_evaluations(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path)
    sink.start({})
    for step in range(1, 1001):
        sink.log(replace(a_record(step), val_loss=2.0 if step == 501 else None))
    sink.close("done")
    rows = read_rows(sink.path, most=100)
    assert len(rows) in (100, 101)
    assert rows[-1]["step"] == 1000
    assert [row["step"] for row in rows if row["val_loss"] is not None] == [501]
    assert rows == sorted(rows, key=lambda row: row["step"] or 0)
