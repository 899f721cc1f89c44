"""The report: whatever a run's folder holds, the page is whole, safe and self-contained."""

import io
import json
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pentode import log
from pentode.report.curve import smooth, span, thin, ticks
from pentode.report.page import write_report
from pentode.report.picture import write_loss_png

EVIL = "a<script>alert(1)</script>\"><img src=x onerror=alert(2)>'"
PNG = b"\x89PNG\r\n"

losses = st.floats(min_value=-1e6, max_value=1e6)


def a_run(folder: Path, rows: int, *, config: str = "", sample: str = "", hole: int | None = None) -> Path:
    (folder / "10").mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, rows + 1):
            row = {
                "step": step,
                "lm_loss": None if step == hole else 5.0 / step,
                "val_loss": 5.1 / step if step % 5 == 0 else None,
                "lr": 1e-3,
                "consumed_tokens": step * 512,
                "tokens_per_sec": 1000.0 + step,
                "elapsed_time_per_iteration_ms": 500.0,
                "wall_time": 1.7e9 + step,
            }
            file.write(json.dumps(row) + "\n")
    if config:
        (folder / "10" / "config.yaml").write_text(config)
    if sample:
        (folder / "sample.txt").write_text(sample)
    return folder


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_nothing_in_the_page_runs_or_is_fetched(tmp_path: Path) -> None:
    config = f"general:\n  run: {EVIL}\ntokens:\n  train_steps: 30\n"
    html = write_report(a_run(tmp_path / "run", 30, config=config, sample=EVIL)).read_text()
    page = Tags(html)
    assert not {"script", "img", "iframe", "object", "link", "base", "form"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert [value for name, value in page.attributes if name in ("href", "src")] == ["metrics.jsonl", "loss.png"]
    assert "default-src 'none'" in html
    assert "http://" not in html
    assert "https://" not in html
    assert html.count("a&lt;script&gt;alert(1)&lt;/script&gt;") == 4  # title, heading, config, sample


def test_secrets_and_control_characters_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    html = write_report(a_run(tmp_path / "run", 2, config="x: hf_canary\n", sample="a\x1b[31m\x00")).read_text()
    assert "hf_canary" not in html
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", html)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 3000])
def test_any_number_of_rows_makes_a_page(tmp_path: Path, rows: int) -> None:
    folder = a_run(tmp_path / "run", rows)
    html = write_report(folder).read_text()
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(charts) == (0 if rows == 0 else 3)
    assert all(ET.fromstring(chart).tag == "svg" for chart in charts)
    assert "nan" not in "".join(charts)
    assert (folder / "loss.png").exists() == (rows > 0)
    assert len(html) < 200_000
    assert not list(folder.glob(".*"))


def test_a_run_without_metrics_has_a_page_that_says_so(tmp_path: Path) -> None:
    assert "No step has been recorded yet" in write_report(tmp_path).read_text()


def test_a_row_without_a_loss_is_passed_over(tmp_path: Path) -> None:
    html = write_report(a_run(tmp_path / "run", 3, hole=2)).read_text()
    assert "1.667" in html


def test_only_a_finished_run_is_called_complete(tmp_path: Path) -> None:
    config = "general:\n  run: demo\ntokens:\n  train_steps: 30\n"
    done = write_report(a_run(tmp_path / "done", 30, config=config)).read_text()
    assert '<span class="state done">complete</span>' in done
    half = write_report(a_run(tmp_path / "half", 12, config=config)).read_text()
    assert '<span class="state">step 12 of 30</span>' in half


def test_headlines_are_the_runs_numbers(tmp_path: Path) -> None:
    html = write_report(a_run(tmp_path / "run", 20)).read_text()
    for word in (
        "<b>0.255</b>",
        "<b>10.2K</b>",
        "<b>1.01K</b>",
        "<b>0:10</b>",
        "from 5.000 at step 1",
        "the best so far",
    ):
        assert word in html, word


def test_the_name_is_the_configs_unless_it_has_a_placeholder(tmp_path: Path) -> None:
    named = write_report(a_run(tmp_path / "x", 1, config="general:\n  run: 'my run'\n")).read_text()
    assert "<title>my run</title>" in named
    dated = write_report(a_run(tmp_path / "folder", 1, config="general:\n  run: a_%date\n")).read_text()
    assert "<title>folder</title>" in dated


def test_the_picture_is_a_png_whatever_the_title(tmp_path: Path) -> None:
    rows = [{"step": step, "lm_loss": 5.0 / step, "val_loss": None} for step in (1, 2, 3)]
    assert write_loss_png(rows, tmp_path / "loss.png", title="$x_{ </script> \x1b")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_without_matplotlib_one_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    stream = io.StringIO()
    log.setup(stream=stream)
    html = write_report(a_run(tmp_path / "run", 3)).read_text()
    assert stream.getvalue().count("\n") == 1
    assert 'pip install "pentode[plots]"' in stream.getvalue()
    assert "loss.png" not in html


@given(st.lists(losses, min_size=1, max_size=200))
def test_the_smooth_line_stays_between_the_extremes(values: list[float]) -> None:
    line = smooth(list(enumerate(values)))
    assert [x for x, _ in line] == list(range(len(values)))
    air = 1e-6 * (1 + max(abs(v) for v in values))
    assert all(min(values) - air <= y <= max(values) + air for _, y in line)


@given(st.lists(losses, min_size=1, max_size=500), st.integers(2, 100))
def test_thinning_keeps_the_extremes_and_the_order(values: list[float], most: int) -> None:
    kept = thin(list(enumerate(values)), most=most)
    assert len(kept) <= most + 2
    assert kept == sorted(kept)
    assert {min(values), max(values)} <= {y for _, y in kept}


@given(st.lists(losses, min_size=1, max_size=50), st.integers(2, 9))
def test_axes_have_a_few_ticks_inside(values: list[float], about: int) -> None:
    low, high = span(values)
    assert low < high
    found = ticks(low, high, about=about)
    assert len(found) <= about + 1
    assert all(low - 1e-6 * abs(low) - 1e-9 <= tick <= high + 1e-6 * abs(high) + 1e-9 for tick in found)
