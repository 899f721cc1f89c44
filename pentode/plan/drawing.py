"""A schedule drawn in characters: a row for each rank, time to the right, in panels as wide as the terminal."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, groupby, pairwise

from pentode.parallel.pipeline.schedules import Action
from pentode.plan.schedule import PipelinePlan

Line = list[tuple[str, str]]  # text, and the mark of what it shows

IDLE = "."
FILLS = {"F": "-", "B": "="}
STYLES = {  # of marks, in rich's words; lower case for every second stage of a rank, or micro-batch if it has one stage
    "F": "white on blue",
    "f": "black on cyan",
    "B": "black on yellow",
    "b": "black on bright_yellow",
    IDLE: "dim",
    "": "",
}
SMALLEST = 0.5  # of the mean: a stage that costs less may have no room for its labels
HEAD, TAIL = 4, 2  # panels that are drawn of a schedule with more
TIGHTEST = 1.2  # times the width of a label: how little room for it keeps the drawing readable
TICK = 8  # columns between numbers of the ruler, or more
NARROWEST = 20  # columns of a panel


@dataclass
class Row:
    """A rank's time in characters; `marks` says of each what it shows."""

    text: str = ""
    marks: str = ""

    def add(self, text: str, mark: str) -> None:
        """Go on with text of one kind."""
        self.text += text
        self.marks += mark * len(text)

    def part(self, start: int, stop: int) -> Line:
        """Characters from start to stop, those of one kind together."""
        marks = self.marks[start:stop]
        cuts = [0]
        for _, run in groupby(marks):
            cuts.append(cuts[-1] + len(list(run)))
        return [(self.text[start + a : start + b], marks[a]) for a, b in pairwise(cuts)]


def draw(plan: PipelinePlan, *, width: int) -> Iterator[Line]:
    """The whole schedule in panels one below the other, or its beginning and end; no line is wider than `width`."""
    names = [f"rank {rank}" for rank in range(plan.ranks)]
    margin = len(names[-1]) + 1
    room = max(NARROWEST, width - margin)
    columns = columns_per_unit(plan, room=room)
    cuts = _cuts(round(plan.timeline.makespan * columns), room=room)
    rows = [_row(plan, rank, columns, cuts) for rank in range(plan.ranks)]
    panels = list(pairwise(cuts))
    left_out = range(HEAD, len(panels) - TAIL) if len(panels) > HEAD + TAIL + 1 else range(0)
    for number, (start, stop) in enumerate(panels):
        if number not in left_out:
            yield [(f"{'time':<{margin}}{_ruler(start, stop, columns)}".rstrip(), "")]
            for name, row in zip(names, rows, strict=True):
                yield [(name.ljust(margin), ""), *row.part(start, stop)]
            yield []
        elif number == left_out.start:
            yield [(f"... {len(left_out)} panels are left out here; --save FILE.svg draws all", "")]
            yield []
    yield [(f"F0 forward of micro-batch 0, B0 its backward, {IDLE} idle{_stages(plan)}", "")]
    yield [("time 1: the forward of a stage of mean cost; a backward takes 2, messages none", "")]


def columns_per_unit(plan: PipelinePlan, *, room: int) -> float:
    """How wide the forward of a mean stage is drawn: so that labels fit but in very short cells, and a gap after them.

    Less gap if all fits into `room` with that.
    """
    labels = max(len(_label(plan, action)) for action in plan.timeline.spans)
    tight = labels / max(SMALLEST, min(plan.costs))
    wanted, fitting = max(labels + 1, math.ceil(tight)), room / plan.timeline.makespan
    return fitting if max(tight, TIGHTEST * labels) <= fitting < wanted else wanted


def _row(plan: PipelinePlan, rank: int, columns: float, cuts: Sequence[int]) -> Row:
    row = Row()
    for action in plan.schedule.programs[rank]:
        start, stop = (round(time * columns) for time in plan.timeline.spans[action])
        row.add(IDLE * (start - len(row.text)), IDLE)
        pale = (plan.turns[action.stage] if plan.stages_per_rank > 1 else action.micro_batch) % 2
        text = _cell(_label(plan, action), start, stop, fill=FILLS[action.kind], cuts=cuts)
        row.add(text, action.kind.lower() if pale else action.kind)
    row.add(IDLE * (cuts[-1] - len(row.text)), IDLE)
    return row


def _cell(label: str, start: int, stop: int, *, fill: str, cuts: Sequence[int]) -> str:
    """A cell with its label where no cut goes through it: at its start, or after a cut; without, if it fits nowhere."""
    edges = [start, *(cut for cut in cuts if start < cut < stop), stop]
    at = next((begin for begin, end in pairwise(edges) if end - begin >= len(label)), None)
    return fill * (stop - start) if at is None else (fill * (at - start) + label).ljust(stop - start, fill)


def _label(plan: PipelinePlan, action: Action) -> str:
    return f"{action.kind}{action.micro_batch}{plan.letters[action.stage]}"


def _cuts(end: int, *, room: int) -> list[int]:
    """Where panels begin and the last one ends, `room` apart or less, and all alike."""
    panels = math.ceil(end / room)
    return [end * panel // panels for panel in range(panels + 1)]


def _ruler(start: int, stop: int, columns: float) -> str:
    """The time at some columns."""
    powers = (step * 10**power for power in count() for step in (1, 2, 5))
    step = next(step for step in powers if step * columns >= TICK)
    line = ""
    for time in range(0, int(stop / columns) + 1, step):
        at = round(time * columns) - start
        if at >= 0 and at + len(str(time)) <= stop - start:
            line = f"{line:<{at}}{time}"
    return line


def _stages(plan: PipelinePlan) -> str:
    if plan.stages_per_rank == 1:
        return ""
    letters = ", ".join(plan.letters[stage] for stage in plan.schedule.stages_of(0)[:3])
    return f"; {letters}{', ...' if plan.stages_per_rank > 3 else ''}: a rank's stages"
