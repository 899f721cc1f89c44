"""Pipeline schedules as data: a pure function gives each rank the list of what it does.

An action is the forward (F) or the backward (B) of one micro-batch through one stage. With pp = 1 every schedule is
F0 B0 F1 B1 ..., which is plain gradient accumulation: there is no second path without pipeline.

In the formulas m is the number of micro-batches, p that of ranks, v that of stages a rank, and r a rank. The bubble is
the share of a step in which ranks wait for each other, where all stages take the same time and messages none. What is
live on a rank is the (stage, micro-batch) pairs between forward and backward: each holds the activations of 1/v of the
rank's layers.

A new schedule is a function like those here, its name in ENGINES, and its name in the type of `pp_engine`
(config/schema.py); `simulate.py` proves it, times it and finds its messages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple


class Action(NamedTuple):
    """One thing a rank does: `kind` of micro-batch `micro_batch` through stage `stage`."""

    kind: Literal["F", "B"]
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}@{self.stage}"


Program = tuple[Action, ...]


@dataclass(frozen=True)
class Schedule:
    """What each rank of a pipeline does.

    placement  the rank of each stage
    programs   each rank's actions, in order
    """

    name: str
    placement: tuple[int, ...]
    programs: tuple[Program, ...]

    @cached_property
    def micro_batches(self) -> int:
        """How many micro-batches there are in a step."""
        return 1 + max((action.micro_batch for program in self.programs for action in program), default=-1)

    def stages_of(self, rank: int) -> list[int]:
        """The stages that a rank holds."""
        return [stage for stage, home in enumerate(self.placement) if home == rank]


def make_schedule(engine: str, *, pp: int, micro_batches: int, stages_per_rank: int = 1) -> Schedule:
    """The schedule that `parallelism.pp_engine` names; stage s is on rank s % pp.

    With pp=1, whatever the engine: no bubble, and one micro-batch live. Raises ValueError where the numbers do not fit.
    """
    if engine not in ENGINES:
        raise ValueError(f"pp_engine: {engine!r} is unknown; use {', '.join(ENGINES)}")
    if min(pp, micro_batches, stages_per_rank) < 1:
        raise ValueError(f"make_schedule: pp={pp}, {micro_batches=}, {stages_per_rank=}; each is 1 or more")
    if pp == 1:
        return Schedule(engine, (0,), (_in_turn(forwards(0, micro_batches), backwards(0, micro_batches)),))
    placement = tuple(stage % pp for stage in range(pp * stages_per_rank))
    programs = ENGINES[engine](pp, micro_batches, stages_per_rank)
    return Schedule(engine, placement, tuple(tuple(program) for program in programs))


def forward_only(placement: Sequence[int], *, micro_batches: int) -> Schedule:
    """Forwards alone, for validation and generation: each rank its stages in order, all micro-batches through each.

    bubble (p - 1) / (v m + p - 1) if m >= p, else 1 - v m / (v p + m - 1); nothing stays live
    """
    stages = range(len(placement))
    programs = tuple(
        tuple(action for stage in stages if placement[stage] == rank for action in forwards(stage, micro_batches))
        for rank in range(max(placement) + 1)
    )
    return Schedule("forward", tuple(placement), programs)


def forwards(stage: int, micro_batches: int) -> list[Action]:
    """The forwards of all micro-batches through a stage."""
    return [Action("F", stage, i) for i in range(micro_batches)]


def backwards(stage: int, micro_batches: int) -> list[Action]:
    """The backwards of all micro-batches through a stage."""
    return [Action("B", stage, i) for i in range(micro_batches)]


def all_forward_all_backward(pp: int, micro_batches: int, stages_per_rank: int) -> list[list[Action]]:
    """AFAB, or GPipe (arXiv:1811.06965): simple, and keeps every micro-batch's activations until the end.

    bubble (p - 1) / (v m + p - 1) if m >= p, else 1 - v m / (v p + m - 1); live on each rank: v m
    """
    programs = []
    for rank in range(pp):
        own = range(rank, pp * stages_per_rank, pp)
        there = [action for stage in own for action in forwards(stage, micro_batches)]
        back = [action for stage in reversed(own) for action in backwards(stage, micro_batches)]
        programs.append(there + back)
    return programs


def one_forward_one_backward(pp: int, micro_batches: int, stages_per_rank: int) -> list[list[Action]]:
    """1F1B (PipeDream-Flush, arXiv:2006.09503): forwards that fill the pipeline, then forward and backward in turn.

    bubble (p - 1) / (m + p - 1), as AFAB's with one stage a rank; live on rank r: min(m, p - r)
    """
    if stages_per_rank != 1:
        raise ValueError(f"pp_engine 1f1b: {stages_per_rank} stages a rank; use interleaved for more than one")
    programs = []
    for rank in range(pp):
        there, back = forwards(rank, micro_batches), backwards(rank, micro_batches)
        programs.append(list(_in_turn(there, back, ahead=min(pp - 1 - rank, micro_batches))))
    return programs


def interleaved(pp: int, micro_batches: int, stages_per_rank: int) -> list[list[Action]]:
    """Interleaved 1F1B (arXiv:2104.04473, section 2.2): each rank holds v stages, v times shorter ones.

    bubble (p - 1) / (v m + p - 1), paid for with (p v - 1) / (p - 1) times the messages, and memory: live on rank r are
    min(v m, (v - 1) p + 2 (p - 1 - r) + 1), as much as p + (p - 1 - 2 r) / v of 1F1B's micro-batches
    """
    if micro_batches % pp:
        fewer, more = micro_batches // pp * pp, -(-micro_batches // pp) * pp
        fit = f"{fewer} or {more}" if fewer else f"{more}"
        raise ValueError(
            f"{micro_batches} micro-batches is not a multiple of pp={pp}, which pp_engine interleaved needs; use {fit}"
        )
    programs = []
    for rank in range(pp):
        own = range(rank, pp * stages_per_rank, pp)
        there = _rounds("F", own, pp=pp, micro_batches=micro_batches)
        back = _rounds("B", own[::-1], pp=pp, micro_batches=micro_batches)
        ahead = min(2 * (pp - 1 - rank) + (stages_per_rank - 1) * pp, len(there))
        programs.append(list(_in_turn(there, back, ahead=ahead)))
    return programs


ENGINES: dict[str, Callable[[int, int, int], list[list[Action]]]] = {
    "afab": all_forward_all_backward,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
}


def _rounds(kind: Literal["F", "B"], stages: Sequence[int], *, pp: int, micro_batches: int) -> list[Action]:
    """pp micro-batches through the first of these stages, the same ones through the next, then the next pp."""
    return [
        Action(kind, stage, first + i) for first in range(0, micro_batches, pp) for stage in stages for i in range(pp)
    ]


def _in_turn(there: Sequence[Action], back: Sequence[Action], *, ahead: int = 0) -> Program:
    """`ahead` forwards, then forward and backward in turn, then the backwards that are left."""
    pairs = zip(there[ahead:], back, strict=False)
    return (*there[:ahead], *(action for pair in pairs for action in pair), *back[len(there) - ahead :])
