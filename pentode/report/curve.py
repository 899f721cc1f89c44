"""What a chart needs to know of a run's rows: series, a smooth line, fewer points, round numbers for the axes."""

import math
from collections.abc import Sequence

from pentode.metrics.jsonl import Row

Point = tuple[float, float]

WINDOW_SHARE = 40  # the smooth line is a mean over one part in so many of the curve
TICK_STEPS = (1, 2, 5, 10)


def series(rows: Sequence[Row], name: str) -> list[Point]:
    """(step, value) of every row that knows `name`."""
    return [(row["step"], value) for row in rows if (value := row.get(name)) is not None and row["step"] is not None]


def smooth(points: Sequence[Point]) -> list[Point]:
    """The centred moving mean. Its window shrinks towards the start, where curves are steep, and loses its right half
    towards the end, where a single noisy step must not bend the line."""
    half = len(points) // (2 * WINDOW_SHARE)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    line = []
    for i, (x, _) in enumerate(points):
        start, stop = i - min(half, i), min(i + min(half, i) + 1, len(points))
        line.append((x, (sums[stop] - sums[start]) / (stop - start)))
    return line


def thin(points: Sequence[Point], *, most: int) -> list[Point]:
    """At most about `most` points: of each bin its lowest and its highest, so that no spike gets lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept = []
    for start in range(0, len(points), size):
        one_bin = points[start : start + size]
        ends = {min(one_bin, key=lambda p: p[1]), max(one_bin, key=lambda p: p[1])}
        kept.extend(sorted(ends))
    return kept


def span(values: Sequence[float], *, trim: float = 0.0) -> tuple[float, float]:
    """Lowest and highest with some air, never equal; `trim` of the values at either end may fall outside."""
    ordered = sorted(values)
    cut = int(len(ordered) * trim)
    low, high = ordered[cut], ordered[-1 - cut]
    air = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - air, high + air


def ticks(low: float, high: float, *, about: int) -> list[float]:
    """Round numbers from `low` to `high`, close to `about` of them."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(s for s in TICK_STEPS if s * unit >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]
