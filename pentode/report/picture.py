"""loss.png: the loss curve as a picture, by matplotlib, which is an extra."""

from collections.abc import Sequence
from pathlib import Path

from pentode import log
from pentode.metrics.jsonl import Row
from pentode.report.curve import series, smooth, span, thin

POINTS = 2000  # of one line
OUTLIERS = 0.01  # share of raw losses that may lie outside the picture
BLUE, ORANGE, INK, PALE = "#2563eb", "#ea580c", "#1f2937", "#e5e7eb"


def write_loss_png(rows: Sequence[Row], path: Path, *, title: str = "") -> bool:
    """Draw training and validation loss into `path`; False without a row to draw or without matplotlib."""
    train, validation = series(rows, "lm_loss"), series(rows, "val_loss")
    if not train:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        log.once(f'no {path.name}: matplotlib is not installed; pip install "pentode[plots]" adds it', level="info")
        return False
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    line = smooth(train)
    steps, losses = zip(*thin(train, most=POINTS), strict=True)
    axes.plot(steps, losses, color=BLUE, alpha=0.22, linewidth=0.8)
    steps, losses = zip(*thin(line, most=POINTS), strict=True)
    marker = "o" if len(train) == 1 else ""
    axes.plot(steps, losses, color=BLUE, linewidth=1.8, marker=marker, label=f"training {line[-1][1]:.4f}")
    if validation:
        steps, losses = zip(*validation, strict=True)
        axes.plot(steps, losses, color=ORANGE, linewidth=1.4, marker="o", markersize=4)
        axes.lines[-1].set_label(f"validation {losses[-1]:.4f}")
    low, high = span([y for _, y in train], trim=OUTLIERS)
    axes.set_ylim(span([low, high, *(y for _, y in line), *(y for _, y in validation)]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss (nats per token)", color=INK)
    axes.set_title(log.printable(title), loc="left", color=INK, fontsize=13, fontweight="bold", parse_math=False)
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=INK, length=0)
    axes.legend(frameon=False, labelcolor=INK)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
    return True
