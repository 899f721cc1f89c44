"""The schedule as a picture, PNG or SVG, by matplotlib, which is an extra."""

from pathlib import Path

from pentode.plan.schedule import PipelinePlan

FORMATS = (".png", ".svg")
FORWARD = ("#2563eb", "#93c5fd")  # of a rank's first, third, ... stage, and of the others
BACKWARD = ("#ea580c", "#fdba74")
INK, PALE = "#1f2937", "#e5e7eb"

WIDTH, WIDEST, PER_UNIT = 8.0, 48.0, 0.28  # inches: of the picture, and of one forward in it
ROW = 0.42  # inches
LABEL = 0.2  # inches that a cell with a number has


def reason_against(path: Path) -> str | None:
    """Why no picture can be written there: what is; what to do. None if it can."""
    if path.suffix.lower() not in FORMATS:
        return f"{path} ends neither in .png nor in .svg; use one of them"
    if not path.parent.is_dir():
        return f"{path.parent} is no folder; make it first"
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return 'matplotlib is not installed; pip install "pentode[plots]" adds it'
    return None


def write_picture(plan: PipelinePlan, path: Path) -> None:
    """Draw the timeline with these stages' costs: forward blue, backward orange, every second stage of a rank pale."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    makespan = plan.timeline.makespan
    width = min(WIDEST, max(WIDTH, PER_UNIT * makespan))
    figure = Figure(figsize=(width, 1.3 + ROW * plan.ranks), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor(PALE)
    for rank, program in enumerate(plan.schedule.programs):
        spans = [plan.timeline.spans[action] for action in program]
        colours = [(FORWARD if a.kind == "F" else BACKWARD)[plan.turns[a.stage] % 2] for a in program]
        bars = [(start, stop - start) for start, stop in spans]
        axes.broken_barh(bars, (rank - 0.45, 0.9), facecolors=colours, edgecolor="white", linewidth=0.4)
        for action, (start, stop) in zip(program, spans, strict=True):
            if (stop - start) / makespan * width >= LABEL:
                text = f"{action.micro_batch}{plan.letters[action.stage]}"
                colour = INK if plan.turns[action.stage] % 2 else "white"
                axes.text((start + stop) / 2, rank, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_xlim(0, makespan)
    axes.set_ylim(plan.ranks - 0.5, -0.5)
    axes.set_yticks(range(plan.ranks), [f"rank {rank}" for rank in range(plan.ranks)])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("time, in forwards of a stage of mean cost (blue: forward, orange: backward)", color=INK)
    idle = max(0.0, plan.timeline.bubble)
    title = f"{plan.schedule.name}, {plan.schedule.micro_batches} micro-batches: ranks idle for {idle:.1%}"
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=INK, length=0)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format=path.suffix.lower().removeprefix("."))
    temporary.replace(path)
