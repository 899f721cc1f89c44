"""`pentode plan --schedule`: what it prints is what a run would do, and it fits the terminal."""

import io
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pentode.cli import run_command
from pentode.config.load import config_from_dict
from pentode.errors import ConfigError
from pentode.parallel.pipeline.partition import stage_layers
from pentode.parallel.pipeline.schedules import ENGINES
from pentode.plan.command import show
from pentode.plan.drawing import STYLES, columns_per_unit, draw
from pentode.plan.schedule import PipelinePlan, facts, plan_pipeline, program_lines
from tests.helpers.config import SMALL, small
from tests.helpers.tiny import tiny_config

ENOUGH = 10**6  # columns, or characters, that nothing here needs
ANSI = re.compile(r"\x1b\[[\d;]*m")
LABEL = re.compile(r"[FB]\d+[a-z]?")


def plan_of(engine: str = "1f1b", *, vocab_size: int = 1, layers: int = 24, **changes: Any) -> PipelinePlan:
    """The plan of a small model; `pp`, `micro_batches`, `per_rank`. One token makes all stages nearly alike."""
    shape = small()["model"]["model_config"] | {"num_hidden_layers": layers, "vocab_size": vocab_size}
    parallelism = {"pp": changes["pp"], "pp_engine": engine, "pp_stages_per_rank": changes.get("per_rank")}
    tokens = {"batch_accumulation_per_replica": changes["micro_batches"]}
    return plan_pipeline(config_from_dict(small(parallelism=parallelism, model={"model_config": shape}, tokens=tokens)))


def drawn(plan: PipelinePlan, *, width: int = ENOUGH) -> list[str]:
    return ["".join(text for text, _ in line) for line in draw(plan, width=width)]


@st.composite
def plans(draw: st.DrawFn) -> PipelinePlan:
    """Any plan that a config can have, its last stage heavy or not."""
    engine, pp = draw(st.sampled_from(sorted(ENGINES))), draw(st.integers(1, 4))
    per_rank = {"1f1b": 1, "interleaved": draw(st.integers(2, 3))}.get(engine, draw(st.integers(1, 3)))
    micro_batches = pp * draw(st.integers(1, 3)) if engine == "interleaved" else draw(st.integers(1, 12))
    return plan_of(
        engine,
        pp=pp,
        micro_batches=micro_batches,
        per_rank=per_rank,
        vocab_size=draw(st.sampled_from((1, 100, 2000))),
        layers=draw(st.integers(12, 16)),
    )


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(SMALL.replace("num_hidden_layers: 1", "num_hidden_layers: 8"))
    return str(path)


FOUR = ["parallelism.pp=4", "parallelism.pp_engine=1f1b", "tokens.batch_accumulation_per_replica=8"]


def test_the_command_prints_facts_stages_and_a_row_for_each_rank(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert run_command(["plan", "--schedule", file, *FOUR, "model.model_config.vocab_size=1"]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert "1f1b: 4 ranks, 1 stage on each, 8 micro-batches a step" in out
    assert "idle for 27.3% of a step if stages cost the same, 27.4% as they are" in out  # 3 / 11, and a little more
    assert "by rank: 4 3 2 1" in out
    assert "48 a step: 24 of activations, 24 of gradients" in out
    assert re.search(r"^ +3 +3 +6-7 +\(2\) +25\.1% +with output layer$", out, re.MULTILINE)
    assert len(re.findall(r"^rank \d \.*F0-F1-", out, re.MULTILINE)) == 3
    assert re.search(r"^rank 3 \.{9}F0-B0====F1-B1===", out, re.MULTILINE)


def test_the_option_may_stand_before_or_after_the_file(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    outs = []
    for words in (["--schedule", file, *FOUR], [file, "--schedule", *FOUR], [file, *FOUR, "--schedule"]):
        assert run_command(["plan", *words]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0]
    assert outs[0] == outs[1] == outs[2]


def test_a_plan_of_nothing_is_refused_with_what_there_is(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", file]) == 64
    assert capsys.readouterr() == (
        "",
        "command line: plan shows one thing so far, and it was not asked for; add --schedule\n",
    )


def test_all_that_is_wrong_is_told_before_anything_is_printed(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--save", "there.pdf", "parallelism.pp=9", "tokens.train_steps=no"]
    assert run_command(["plan", "--schedule", file, *words]) == 64
    out, err = capsys.readouterr()
    assert out == ""
    assert "--save: there.pdf ends neither in .png nor in .svg; use one of them" in err
    assert "parallelism.pp: 9 stages is more than the 8 layers of model.model_config; use pp=8 or less" in err
    assert "tokens.train_steps: 'no'" in err
    assert len(err.splitlines()) == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_one_rank_is_a_pipeline_too(engine: str) -> None:
    plan = plan_of(engine, pp=1, micro_batches=3)
    assert drawn(plan)[:2] == ["time   0              5", "rank 0 F0-B0====F1-B1====F2-B2===="]
    lines = "\n".join(facts(plan))
    assert "idle for 0.0% of a step if stages cost the same, 0.0% as they are" in lines
    assert re.search(r"^messages +none a step$", lines, re.MULTILINE)
    assert re.search(r"0-23 +\(24\) +100.0% +with embedding and output layer$", lines, re.MULTILINE)


def test_a_vocabulary_left_to_the_data_is_refused_where_it_matters(tmp_path: Path) -> None:
    assert plan_pipeline(tiny_config(tmp_path)).costs == [1.0]
    with pytest.raises(ConfigError) as error:
        plan_pipeline(tiny_config(tmp_path, parallelism__pp=2))
    assert error.value.problems == [
        "model.model_config.vocab_size: -1, to be taken from the data, but the cut into 2 stages depends on it; add "
        "model.model_config.vocab_size=N after the file"
    ]


@given(plans())
def test_the_stages_are_those_of_a_run_and_their_costs_are_of_the_mean(plan: PipelinePlan) -> None:
    assert sum(plan.costs) == pytest.approx(len(plan.layers))
    assert [layer for own in plan.layers for layer in own] == list(range(sum(map(len, plan.layers))))
    assert len(plan.layers) == len(plan.schedule.placement)


def test_a_heavy_output_layer_is_seen_in_the_cut_and_in_the_bubble() -> None:
    shape = small()["model"]["model_config"] | {"num_hidden_layers": 24, "vocab_size": 2000}
    config = config_from_dict(small(model={"model_config": shape}))
    plan = plan_of(pp=4, micro_batches=8, vocab_size=2000)
    assert plan.layers == stage_layers(config.model.model_config, stages=4, sequence_length=8)
    assert plan.timeline.bubble > plan.even.bubble + 0.1
    assert max(plan.costs) == plan.costs[-1]


@given(plans(), st.integers(80, 160))
def test_no_line_is_wider_than_the_terminal(plan: PipelinePlan, width: int) -> None:
    lines = drawn(plan, width=width)
    assert max(map(len, lines)) <= width
    assert all(line.isascii() for line in lines)


@given(plans())
def test_a_row_shows_a_ranks_actions_in_their_order_for_as_long_as_they_take(plan: PipelinePlan) -> None:
    lines = drawn(plan)
    columns = columns_per_unit(plan, room=ENOUGH)
    for rank, program in enumerate(plan.schedule.programs):
        (line,) = (line for line in lines if line.startswith(f"rank {rank} "))
        row = line.removeprefix(f"rank {rank} ")
        assert len(row) == round(plan.timeline.makespan * columns)
        busy = sum(stop - start for start, stop in (plan.timeline.spans[action] for action in program))
        assert len(row) - row.count(".") == pytest.approx(busy * columns, abs=len(program))
        shown = [f"{a.kind}{a.micro_batch}{plan.letters[a.stage]}" for a in program]
        if min(plan.costs) >= 0.5:
            assert LABEL.findall(row) == shown
        for action, label in zip(program, shown, strict=True):
            start, stop = (round(time * columns) for time in plan.timeline.spans[action])
            assert re.fullmatch(rf"({label})?[{'-' if action.kind == 'F' else '='}]*", row[start:stop])


@given(plans(), st.integers(80, 160))
def test_panels_one_after_the_other_are_the_whole(plan: PipelinePlan, width: int) -> None:
    lines = drawn(plan, width=width)
    if any(line.startswith("...") for line in lines):
        return
    rows = ["".join(line[7:] for line in lines if line.startswith(f"rank {rank} ")) for rank in range(plan.ranks)]
    assert len({len(row) for row in rows}) == 1
    labels = {f"{a.kind}{a.micro_batch}{plan.letters[a.stage]}" for a in plan.timeline.spans}
    assert all(label in labels for row in rows for label in LABEL.findall(row)), "no label is cut in two"


def test_a_schedule_a_little_too_wide_is_drawn_closer_instead_of_in_panels() -> None:
    plan = plan_of(pp=4, micro_batches=8)
    wide, close = drawn(plan, width=120), drawn(plan, width=100)
    assert max(map(len, wide[:5])) > 100
    assert len(wide) == len(close)
    for rank in range(4):
        assert LABEL.findall(wide[1 + rank]) == LABEL.findall(close[1 + rank])


def test_the_middle_of_a_long_schedule_is_left_out_and_that_is_said() -> None:
    lines = drawn(plan_of(pp=4, micro_batches=128), width=80)
    (said,) = (line for line in lines if line.startswith("..."))
    assert re.fullmatch(r"\.\.\. \d+ panels are left out here; --save FILE\.svg draws all", said)
    assert sum(line.startswith("time ") for line in lines) == 4 + 2 + 1  # HEAD, TAIL, the legend
    assert lines[1].startswith("rank 0 F0")
    last = [line for line in lines if line.startswith("rank 0 ")][-1]
    assert LABEL.findall(last)[-1] == "B127"


def test_the_ruler_stands_where_its_times_are() -> None:
    plan = plan_of(pp=2, micro_batches=16)
    lines, columns = drawn(plan), columns_per_unit(plan, room=ENOUGH)
    assert {found.start() - 7: int(found[0]) for found in re.finditer(r"\d+", lines[0])} == {
        time * columns: time for time in range(0, 52, 2)
    }


def test_stages_of_a_rank_are_told_apart() -> None:
    plan = plan_of("interleaved", pp=2, micro_batches=2, per_rank=3)
    assert plan.letters == ["a", "a", "b", "b", "c", "c"]
    assert drawn(plan)[1].startswith("rank 0 F0a-F1a-F0b-F1b-F0c-")
    assert drawn(plan)[-2].endswith("a, b, c: a rank's stages")
    many = plan_of("afab", pp=2, micro_batches=1, per_rank=28, layers=56)
    assert many.letters[::2][24:] == ["y", "z", "aa", "ab"]


def test_actions_print_the_programs_with_their_messages(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["parallelism.pp=2", "tokens.batch_accumulation_per_replica=1"]
    assert run_command(["plan", "--schedule", file, *words, "--actions"]) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "rank 0",
        "  POST gradient0@1 from 1, F0@0, SEND activation0@0 to 1, B0@0",
        "rank 1",
        "  POST activation0@0 from 0, F0@1, B0@1, SEND gradient0@1 to 0",
    ]


@given(plans(), st.integers(80, 160))
def test_wrapped_programs_hold_every_step(plan: PipelinePlan, width: int) -> None:
    lines = list(program_lines(plan, width=width))[1:]
    assert max(map(len, lines)) <= width
    starts = [i for i, line in enumerate(lines) if line.startswith("rank ")]
    for start, stop, program in zip(starts, [*starts[1:], len(lines)], plan.programs, strict=True):
        words = " ".join(line.strip() for line in lines[start + 1 : stop])
        assert words == ", ".join(map(str, program))


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_colour_and_a_pipe_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich would colour a pipe, too
    monkeypatch.setenv("TERM", "xterm-256color")
    lines = list(draw(plan_of("interleaved", pp=2, micro_batches=4), width=100))
    assert {mark for line in lines for _, mark in line} == STYLES.keys()
    terminal, pipe = Terminal(), io.StringIO()
    show(lines, terminal)
    show(lines, pipe)
    assert "\x1b" not in pipe.getvalue()
    assert ANSI.search(terminal.getvalue())
    assert ANSI.sub("", terminal.getvalue()) == pipe.getvalue()


def test_the_picture_is_a_png_or_an_svg(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", "b.SVG"):
        assert run_command(["plan", "--schedule", file, *FOUR, "--save", str(folder / name)]) == 0
        assert capsys.readouterr().out.endswith(f"wrote {folder / name}\n")
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert ET.parse(folder / "b.SVG").getroot().tag.endswith("svg")
    assert "rank 3" in (folder / "b.SVG").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.SVG"]


def test_without_matplotlib_the_picture_is_refused_and_the_text_is_not(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run_command(["plan", "--schedule", file, *FOUR, "--save", str(tmp_path / "a.png")]) == 64
    assert capsys.readouterr() == (
        "",
        'command line: --save: matplotlib is not installed; pip install "pentode[plots]" adds it\n',
    )
    assert run_command(["plan", "--schedule", file, *FOUR]) == 0


def test_a_picture_in_no_folder_is_refused(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", "--schedule", file, "--save", str(tmp_path / "none" / "a.png")]) == 64
    assert f"--save: {tmp_path / 'none'} is no folder; make it first" in capsys.readouterr().err
