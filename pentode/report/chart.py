"""Charts as SVG text: no script; what the pointer is over is shown by CSS alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from pentode import log
from pentode.report.curve import Point, smooth, span, thin, ticks

POINTS = 800  # of one line; more could not be told apart
PROBES = 90  # places across the loss chart that answer the pointer
OUTLIERS = 0.01  # share of raw losses that may lie outside the picture, so that one spike does not flatten the rest
TIP_WIDTH, TIP_HEIGHT, TIP_LINE = 142, 55, 15
MANY = 100_000  # from here on a step is written with a K


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A drawing area in SVG units, and the values that its edges stand for."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    left: int = 52
    right: int = 14
    top: int = 12
    bottom: int = 26

    def at(self, point: Point) -> tuple[float, float]:
        """Where a point lies; one beyond an edge is put on it."""
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        inner_width, inner_height = self.width - self.left - self.right, self.height - self.top - self.bottom
        return (
            round(self.left + min(max(across, 0.0), 1.0) * inner_width, 1),
            round(self.height - self.bottom - min(max(up, 0.0), 1.0) * inner_height, 1),
        )

    def line(self, points: Sequence[Point], kind: str) -> str:
        """A line through the points, or a dot if there is only one."""
        places = [self.at(point) for point in points]
        if len(places) == 1:
            return f'<circle class="dot {kind}" cx="{places[0][0]}" cy="{places[0][1]}" r="3"/>'
        return f'<polyline class="line {kind}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>'

    def dots(self, points: Sequence[Point], kind: str) -> str:
        places = (self.at(point) for point in points)
        return "".join(f'<circle class="dot {kind}" cx="{x}" cy="{y}" r="3"/>' for x, y in places)

    def axes(self, *, x_ticks: int, y_ticks: int) -> str:
        parts = []
        for value in ticks(*self.y, about=y_ticks):
            _, y = self.at((self.x[0], value))
            parts.append(f'<line class="grid" x1="{self.left}" x2="{self.width - self.right}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text class="tick" x="{self.left - 8}" y="{y + 4}" text-anchor="end">{_label(value)}</text>')
        for value in (t for t in ticks(*self.x, about=x_ticks) if t.is_integer()):
            x, _ = self.at((value, self.y[0]))
            below = self.height - self.bottom + 17
            parts.append(f'<text class="tick" x="{x}" y="{below}" text-anchor="middle">{_step(value)}</text>')
        return "".join(parts)


def loss_chart(train: Sequence[Point], validation: Sequence[Point]) -> str:
    """Training loss, faint as recorded and smoothed on top, and validation loss with a dot per evaluation."""
    line = smooth(train)
    low, high = span([y for _, y in train], trim=OUTLIERS)
    low, high = span([low, high, *(y for _, y in line), *(y for _, y in validation)])
    frame = Frame(width=900, height=360, x=_steps([*train, *validation]), y=(low, high))
    body = [
        frame.axes(x_ticks=8, y_ticks=6),
        frame.line(thin(train, most=POINTS), "raw"),
        frame.line(thin(line, most=POINTS), "train"),
    ]
    if validation:
        body += [frame.line(validation, "validation"), frame.dots(thin(validation, most=PROBES), "validation")]
    body += _probes(frame, line, validation)
    return _svg(frame, "".join(body), label="training and validation loss by step")


def small_chart(points: Sequence[Point], *, label: str, noisy: bool) -> str:
    """One quantity over the steps, from zero up; a noisy one is drawn faint, with a smooth line on top."""
    top = span([y for _, y in points], trim=OUTLIERS)[1]
    frame = Frame(width=300, height=140, x=_steps(points), y=(0.0, top if top > 0 else 1.0), left=44)
    body = frame.axes(x_ticks=3, y_ticks=3)
    body += frame.line(thin(points, most=POINTS), "faint" if noisy else "plain")
    body += frame.line(thin(smooth(points), most=POINTS), "plain") if noisy else ""
    return _svg(frame, body, label=label)


def _probes(frame: Frame, line: Sequence[Point], validation: Sequence[Point]) -> list[str]:
    """Upright strips; the one under the pointer shows its step and its losses."""
    every = max(1, len(line) // PROBES)
    chosen = list(line[::every])
    places = [frame.at(point) for point in chosen]
    edges = [frame.left, *((a[0] + b[0]) / 2 for a, b in pairwise(places))]
    edges.append(frame.width - frame.right)
    floor = frame.height - frame.bottom
    parts, seen = [], 0
    for i, ((step, loss), (x, y)) in enumerate(zip(chosen, places, strict=True)):
        while seen < len(validation) and validation[seen][0] <= step:
            seen += 1
        words = [f"step {int(step):,}", f"train {loss:.4f}"]
        words += [f"validation {validation[seen - 1][1]:.4f}"] if seen else []
        left = x + 10 if x < frame.width / 2 else x - 10 - TIP_WIDTH
        tip = f'<rect class="tip" x="{left:.1f}" y="{frame.top}" width="{TIP_WIDTH}" height="{TIP_HEIGHT}" rx="5"/>'
        for row, word in enumerate(words):
            tip += f'<text x="{left + 10:.1f}" y="{frame.top + TIP_LINE * (row + 1) + 2}">{word}</text>'
        parts.append(
            f'<g class="probe"><rect x="{edges[i]:.1f}" y="{frame.top}" width="{edges[i + 1] - edges[i]:.1f}" '
            f'height="{floor - frame.top}"/><g><line x1="{x}" x2="{x}" y1="{frame.top}" y2="{floor}"/>'
            f'<circle class="dot train" cx="{x}" cy="{y}" r="4"/>{tip}</g></g>'
        )
    return parts


def _svg(frame: Frame, body: str, *, label: str) -> str:
    return f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _steps(points: Sequence[Point]) -> tuple[float, float]:
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    return (first, last) if first < last else (first - 1, last + 1)


def _step(value: float) -> str:
    return f"{value:,.0f}" if abs(value) < MANY else log.human(value)


def _label(value: float) -> str:
    return log.human(value) if value else "0"
