"""Sinks: none of them may stop a run; the benchmark CSV gets one row a run."""

import csv
import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from pentode import log
from pentode.metrics.csv import COLUMNS, BenchmarkCsv
from pentode.metrics.record import Record
from pentode.metrics.sinks import Sinks, open_sinks
from tests.helpers.tiny import tiny_config, tiny_dict


def a_record(step: int, *, speed: float = 100.0) -> Record:
    return Record(
        step=step,
        lm_loss=2.0,
        consumed_tokens=step,
        global_batch_size=4,
        tokens_per_sec_per_gpu=speed,
        model_tflops_per_gpu=speed / 100,
        hardware_tflops_per_gpu=speed / 100,
        cuda_memory_allocated=3 * 1024**3,
    )


class Keeper:
    def __init__(self, *, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.seen: list[object] = []

    def start(self, info: dict[str, object]) -> None:
        self.seen.append(info)

    def log(self, record: Record) -> None:
        if record.step == self.fails_at:
            raise OSError(28, "No space left on device")
        self.seen.append(record.step)

    def close(self, status: str) -> None:
        self.seen.append(status)


def test_a_sink_that_raises_is_switched_off_with_one_warning() -> None:
    stream = io.StringIO()
    log.setup(stream=stream)
    bad, good = Keeper(fails_at=2), Keeper()
    sinks = Sinks([bad, good])
    sinks.start({})
    for step in (1, 2, 3):
        sinks.log(a_record(step))
    sinks.close("done")
    sinks.close("failed")
    assert bad.seen == [{}, 1]
    assert good.seen == [{}, 1, 2, 3, "done"]
    assert stream.getvalue().count("\n") == 1
    assert "[WARNING|DP=0|PP=0|TP=0]: metrics: Keeper is switched off" in stream.getvalue()
    assert "No space left on device" in stream.getvalue()


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_into(path: Path, *, name: str = "a", speeds: tuple[float, ...] = (1, 1, 100, 110, 120)) -> None:
    sink = BenchmarkCsv(path)
    sink.start({"run": name, "job_id": "7", "nodes": 1, "sequence_lengths": {1: 256}, "micro_batch_size": 2})
    for step, speed in enumerate(speeds, start=1):
        sink.log(a_record(step, speed=speed))
    sink.close("done")


def test_the_csv_gets_one_row_a_run_without_the_warm_up(tmp_path: Path) -> None:
    path = tmp_path / "bench" / "all.csv"
    run_into(path)
    run_into(path, name='b, "quoted"')
    rows = table(path)
    assert [row["name"] for row in rows] == ["a", 'b, "quoted"']
    assert tuple(rows[0]) == COLUMNS
    assert float(rows[0]["tok/s/gpu"]) == 110
    assert float(rows[0]["mTFLOPs"]) == 1.1
    assert float(rows[0]["Mem Alloc (GB)"]) == 3
    assert rows[0]["Mem Res (GB)"] == ""


def test_a_csv_that_someone_else_began_keeps_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "bench.csv"
    path.write_text("job_id,name,Bandwidth (GB/s),tok/s/gpu\n1,old,0,5\n")
    run_into(path)
    assert table(path)[1] == {"job_id": "7", "name": "a", "Bandwidth (GB/s)": "", "tok/s/gpu": "110"}


def test_a_csv_with_a_column_for_the_project_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "bench.csv"
    path.write_text("project,name\n")
    sink = BenchmarkCsv(path)
    sink.start({"run": "a", "project": "lab"})
    sink.log(a_record(1))
    sink.close("done")
    assert table(path) == [{"project": "lab", "name": "a"}]


def test_the_csvs_sequence_length_is_that_of_the_steps_it_measured(tmp_path: Path) -> None:
    path = tmp_path / "bench.csv"
    for steps in (range(1, 5), range(1, 9), range(6, 9)):
        sink = BenchmarkCsv(path)
        sink.start({"run": "a", "sequence_lengths": {1: 256, 5: 1024, 100: 4096}})
        for step in steps:
            sink.log(a_record(step))
        sink.close("done")
    assert [row["seq_len"] for row in table(path)] == ["256", "256+1024", "1024"]


def test_a_run_without_a_step_leaves_no_row(tmp_path: Path) -> None:
    run_into(tmp_path / "bench.csv", speeds=())
    assert not (tmp_path / "bench.csv").exists()


def test_sinks_are_told_the_project_and_the_stages_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Keeper()
    monkeypatch.setattr("pentode.metrics.sinks.Console", lambda **facts: keeper)
    (first,) = tiny_dict(tmp_path)["data_stages"]
    stages = [first, first | {"name": "next", "start_training_step": 5, "sequence_length": 8}]
    open_sinks(tiny_config(tmp_path, data_stages=stages), run="demo").close("done")
    info = keeper.seen[0]
    assert isinstance(info, dict)
    assert (info["project"], info["run"], info["sequence_lengths"]) == ("tests", "demo", {1: 16, 5: 8})


def test_the_config_decides_which_sinks_there_are(tmp_path: Path) -> None:
    config = SimpleNamespace(
        tokens=SimpleNamespace(train_steps=3, sequence_length=8, micro_batch_size=2, batch_accumulation_per_replica=1),
        logging=SimpleNamespace(iteration_step_info_interval=1),
        checkpoints=SimpleNamespace(folder=tmp_path / "run"),
        general=SimpleNamespace(project="lab", benchmark_csv_path=tmp_path / "bench.csv"),
        data_stages=[
            SimpleNamespace(start_training_step=1, sequence_length=None),
            SimpleNamespace(start_training_step=3, sequence_length=16),
        ],
    )
    log.setup(stream=io.StringIO())
    sinks = open_sinks(config, run="demo", resume_step=0)
    sinks.log(a_record(1))
    sinks.close("done")
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1
    (row,) = table(tmp_path / "bench.csv")
    assert (row["name"], row["seq_len"]) == ("demo", "8")
    config.general.benchmark_csv_path = None
    assert len(open_sinks(config, run="demo").sinks) == 2
