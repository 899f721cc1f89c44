"""Pipeline schedules as data: a pure function gives each rank the list of what it does.

An action is the forward (F) or the backward (B) of one micro-batch through one stage. With pp = 1 every schedule is
F0 B0 F1 B1 ..., which is plain gradient accumulation: there is no second path without pipeline.
"""

from typing import Literal, NamedTuple


class Action(NamedTuple):
    """One thing a rank does: `kind` of micro-batch `micro_batch` through stage `stage`."""

    kind: Literal["F", "B"]
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}@{self.stage}"


def one_stage(micro_batches: int) -> list[Action]:
    """The program of the only rank of a pipeline of one stage."""
    return [Action(kind, 0, i) for i in range(micro_batches) for kind in ("F", "B")]
