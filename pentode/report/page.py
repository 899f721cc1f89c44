"""report.html: one self-contained page about a run. Charts are inline SVG; nothing is fetched, nothing runs.

Names and texts come from users, data and models: all of them pass through `_text`, and the page's policy forbids
scripts and remote anything besides.
"""

import re
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median

from pentode import log
from pentode.metrics.console import clock
from pentode.metrics.jsonl import NAME, Row, read_rows
from pentode.report.chart import loss_chart, small_chart
from pentode.report.curve import series, smooth
from pentode.report.picture import write_loss_png

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
SMALL_CHARTS = (  # field, title, whether it is noisy
    ("lr", "Learning rate", False),
    ("tokens_per_sec", "Tokens per second", True),
    ("grad_norm", "Gradient norm", True),
)
ROWS = 20_000  # read of a long run, so that its page is written as quickly as a short one's
SAMPLE_LENGTH = 20_000  # characters of sample.txt that are shown
EVALUATIONS = 200  # newest validation results in the table


def write_report(run_folder: Path) -> Path:
    """Write `run_folder`/report.html and, where matplotlib is installed, loss.png; return the page's path.

    Reads metrics.jsonl, the newest checkpoint's config.yaml and sample.txt, each if it is there.
    """
    rows = read_rows(run_folder / NAME, most=ROWS)
    config = _config_text(run_folder)
    name = _run_name(config) or run_folder.resolve().name
    picture = write_loss_png(rows, run_folder / "loss.png", title=name)
    sample = run_folder / "sample.txt"
    text = sample.read_text(encoding="utf-8", errors="replace")[:SAMPLE_LENGTH] if sample.exists() else ""
    path = run_folder / "report.html"
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page(rows, name=name, config=config, sample=text, picture=picture), encoding="utf-8")
    temporary.replace(path)
    return path


def page(rows: Sequence[Row], *, name: str, config: str, sample: str, picture: bool = False) -> str:
    """The page's HTML."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    links = [f'<a href="{NAME}">{NAME}</a>'] + (['<a href="loss.png">loss.png</a>'] if picture else [])
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(name)}</title><style>{style}</style></head><body>",
        _header(rows, name=name, project=_value(config, "project"), train_steps=_train_steps(config)),
        *(_results(rows) if series(rows, "lm_loss") else ["<p>No step has been recorded yet.</p>"]),
    ]
    if sample:
        parts.append(
            f'<section class="card"><h2>A sample of its text</h2><pre class="sample">{_text(sample)}</pre></section>'
        )
    if config:
        parts.append(
            f'<section class="card"><details><summary>Config</summary><pre>{_text(config)}</pre></details></section>'
        )
    parts.append(f"<footer>Exact numbers: {', '.join(links)}. Written by Pentode.</footer></body></html>\n")
    return "\n".join(parts)


def _header(rows: Sequence[Row], *, name: str, project: str, train_steps: int | None) -> str:
    step = rows[-1]["step"] or 0 if rows else 0
    done = train_steps is not None and step >= train_steps
    state = "complete" if done else f"step {step:,}" + (f" of {train_steps:,}" if train_steps else "")
    when = rows[-1].get("wall_time") if rows else None
    date = time.strftime("last step on %d %B %Y, %H:%M", time.localtime(when)) if when else ""
    kind = "state done" if done else "state"
    facts = ", ".join(fact for fact in (project and f"project {project}", date) if fact)
    return f'<header><h1>{_text(name)}</h1><span class="{kind}">{state}</span><p>{_text(facts)}</p></header>'


def _results(rows: Sequence[Row]) -> list[str]:
    train, validation = series(rows, "lm_loss"), series(rows, "val_loss")
    legend = '<span><i></i>training, smoothed</span><span><i class="raw"></i>training, each step</span>'
    if validation:
        legend += '<span><i class="validation"></i>validation</span>'
    small = [
        f'<div class="card"><h2>{title}</h2>{small_chart(points, label=title, noisy=noisy)}</div>'
        for name, title, noisy in SMALL_CHARTS
        if (points := series(rows, name))
    ]
    chart = loss_chart(train, validation)
    parts = [
        f'<section class="numbers">{"".join(_numbers(rows))}</section>',
        f'<section class="card loss"><div class="legend"><h2>Loss</h2>{legend}</div>{chart}</section>',
        f'<section class="pair">{"".join(small)}</section>',
    ]
    if validation:
        parts.append(_evaluations(rows))
    return parts


def _numbers(rows: Sequence[Row]) -> list[str]:
    """The headline numbers, each with a word on it."""
    train, validation = series(rows, "lm_loss"), series(rows, "val_loss")
    speeds = [y for _, y in series(rows, "tokens_per_sec")]
    times = [y for _, y in series(rows, "elapsed_time_per_iteration_ms")]
    utilisation = [y for _, y in series(rows, "mfu")]
    last = smooth(train)[-1][1]
    cards = [("training loss", f"{last:.3f}", f"from {train[0][1]:.3f} at step {int(train[0][0]):,}")]
    if validation:
        best = min(validation, key=lambda point: point[1])
        note = f"best {best[1]:.3f} at step {int(best[0]):,}" if best != validation[-1] else "the best so far"
        cards.append(("validation loss", f"{validation[-1][1]:.3f}", note))
    cards.append(("tokens", log.human(rows[-1].get("consumed_tokens") or 0), f"after step {rows[-1]['step'] or 0:,}"))
    if speeds:
        cards.append(("tokens per second", log.human(median(speeds)), "median"))
    if times:
        cards.append(("training time", clock(_seconds(rows)), f"{log.human(median(times))} ms a step"))
    if utilisation:
        cards.append(("MFU", f"{100 * median(utilisation):.1f}%", "median, attention in full"))
    return [
        f'<div class="card"><span>{what}</span><b>{value}</b><span>{note}</span></div>' for what, value, note in cards
    ]


def _evaluations(rows: Sequence[Row]) -> str:
    smoothed = dict(smooth(series(rows, "lm_loss")))
    evaluated = [row for row in rows if row.get("val_loss") is not None][-EVALUATIONS:]
    lines = [
        f"<tr><td>{row['step']:,}</td><td>{log.human(row.get('consumed_tokens') or 0)}</td>"
        f"<td>{_number(smoothed.get(row['step'] or 0))}</td><td>{_number(row['val_loss'])}</td></tr>"
        for row in evaluated
    ]
    head = "<tr><th>step</th><th>tokens</th><th>training loss, smoothed</th><th>validation loss</th></tr>"
    table = f"<table>{head}{''.join(lines)}</table>"
    return f'<section class="card"><details><summary>Validation results</summary>{table}</details></section>'


def _seconds(rows: Sequence[Row]) -> float:
    """Time spent in steps; a row stands for all steps since the row before it."""
    total, before = 0.0, 0
    for row in rows:
        step = row["step"] or 0
        total += (row.get("elapsed_time_per_iteration_ms") or 0.0) * max(step - before, 0) / 1000
        before = step
    return total


def _config_text(run_folder: Path) -> str:
    """The config saved in the run's folder, or else in its newest checkpoint; "" if there is none."""
    steps = sorted((int(f.name) for f in run_folder.iterdir() if f.name.isdecimal()), reverse=True)
    places = [run_folder / "config.yaml", *(run_folder / str(step) / "config.yaml" for step in steps)]
    found = next((place for place in places if place.is_file()), None)
    return found.read_text(encoding="utf-8", errors="replace") if found else ""


def _run_name(config: str) -> str:
    """`general.run` as the config has it; "" where it is missing or still holds a placeholder."""
    name = _value(config, "run")
    return "" if "%" in name else name


def _value(config: str, key: str) -> str:
    """The first value that stands under `key`, "" where none does."""
    found = re.search(rf"^ +{key}: *(.+?) *$", config, re.MULTILINE)
    return found[1].strip("'\"") if found else ""


def _train_steps(config: str) -> int | None:
    found = re.search(r"^ +train_steps: *(\d+) *$", config, re.MULTILINE)
    return int(found[1]) if found else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _text(text: str) -> str:
    return escape(log.printable(text))
