"""Proves, times and completes schedules: what each action waits for, and which messages that takes. Pure arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pentode.parallel.pipeline.schedules import Action, Schedule

COSTS: Mapping[str, float] = {"F": 1.0, "B": 2.0}  # a backward multiplies twice as much


class Transfer(NamedTuple):
    """One message between neighbouring stages on two ranks.

    kind   SEND: begin to send what the action before made; POST: begin to receive, which the action that uses it
           waits for
    what   an activation goes to the next stage, a gradient to the one before
    stage  the stage that made it
    peer   the pipeline rank on the other side
    """

    kind: Literal["SEND", "POST"]
    what: Literal["activation", "gradient"]
    stage: int
    micro_batch: int
    peer: int

    def __str__(self) -> str:
        way = "to" if self.kind == "SEND" else "from"
        return f"{self.kind} {self.what}{self.micro_batch}@{self.stage} {way} {self.peer}"


@dataclass(frozen=True)
class Timeline:
    """When each action begins and ends, in units of one forward, if messages take no time.

    peak_live  for each rank, the most micro-batches (of any of its stages) between their forward and their backward
    """

    spans: Mapping[Action, tuple[float, float]]
    makespan: float
    bubble: float
    peak_live: tuple[int, ...]


def simulate(
    schedule: Schedule,
    *,
    costs: Mapping[str, float] = COSTS,
    stage_costs: Sequence[float] | None = None,
    durations: Mapping[tuple[str, int], float] | None = None,
) -> Timeline:
    """Run the programs against what their actions need.

    costs        of the kinds of action
    stage_costs  what those of each stage are multiplied by; 1 for all by default
    durations    of each kind of action on each stage, as measured, in place of those two

    Raises RuntimeError if an action is missing, done twice or on a wrong rank, or if ranks would wait for ever.
    """
    _check_actions(schedule)
    factors = stage_costs or [1.0] * len(schedule.placement)
    long = durations or {
        (kind, stage): cost * factor for kind, cost in costs.items() for stage, factor in enumerate(factors)
    }
    ends: dict[Action, float] = {}
    spans: dict[Action, tuple[float, float]] = {}
    clocks, places = [0.0] * len(schedule.programs), [0] * len(schedule.programs)
    left = sum(map(len, schedule.programs))
    while left:
        moved = False
        for rank, program in enumerate(schedule.programs):
            while places[rank] < len(program):
                action = program[places[rank]]
                needs = needed(action, schedule)
                if any(need not in ends for need in needs):
                    break
                start = max([clocks[rank], *(ends[need] for need in needs)])
                ends[action] = clocks[rank] = start + long[action.kind, action.stage]
                spans[action] = start, clocks[rank]
                places[rank] += 1
                left -= 1
                moved = True
        if left and not moved:
            waiting = [
                f"rank {rank} waits at {program[places[rank]]}"
                for rank, program in enumerate(schedule.programs)
                if places[rank] < len(program)
            ]
            raise RuntimeError(f"pipeline schedule deadlocks: {', '.join(waiting)}")
    makespan = max(clocks)
    busy = sum(end - start for start, end in spans.values())
    live = tuple(_peak_live(program) for program in schedule.programs)
    return Timeline(spans, makespan, 1 - busy / (makespan * len(schedule.programs)), live)


def needed(action: Action, schedule: Schedule) -> list[Action]:
    """The actions whose results an action uses."""
    kind, stage, i = action
    if kind == "F":
        return [Action("F", stage - 1, i)] if stage > 0 else []
    last = len(schedule.placement) - 1
    return [Action("F", stage, i), *([Action("B", stage + 1, i)] if stage < last else [])]


def with_transfers(schedule: Schedule) -> tuple[tuple[Action | Transfer, ...], ...]:
    """The programs with the messages between ranks.

    What one rank sends another goes in order. So a receive is begun one action before the one that uses it, or earlier
    if a later message is used first: the orders on both sides are one, which no timing can upset.
    """
    sent = {  # (from, to) -> the messages in their order
        (source, target): [action for action in program for peer in [_target(action, schedule)] if peer == target]
        for source, program in enumerate(schedule.programs)
        for target in range(len(schedule.programs))
    }
    return tuple(_program_with_transfers(rank, schedule, sent) for rank in range(len(schedule.programs)))


def messages_at_once(program: Sequence[Action | Transfer]) -> int:
    """The most messages of one channel that a rank has not used when it needs the newest of them."""
    most = 0
    waiting: dict[int, list[tuple[str, int, int]]] = {}  # by the rank they come from, in their order
    used: set[tuple[str, int, int]] = set()
    for step in program:
        if isinstance(step, Transfer):
            if step.kind == "POST":
                waiting.setdefault(step.peer, []).append((step.what, step.stage, step.micro_batch))
            continue
        kind, stage, i = step
        needs = ("activation", stage - 1, i) if kind == "F" else ("gradient", stage + 1, i)
        for messages in waiting.values():
            if needs in messages:
                most = max(most, messages.index(needs) + 1)
                used.add(needs)
            while messages and messages[0] in used:
                messages.pop(0)
    return most


def _program_with_transfers(
    rank: int, schedule: Schedule, sent: Mapping[tuple[int, int], Sequence[Action]]
) -> tuple[Action | Transfer, ...]:
    program = schedule.programs[rank]
    posts: list[list[Transfer]] = [[] for _ in program]
    posted = dict.fromkeys(range(len(schedule.programs)), 0)
    for place, action in enumerate(program):
        for need in needed(action, schedule):
            source = schedule.placement[need.stage]
            if source == rank:
                continue
            upto = sent[source, rank].index(need) + 1
            for made in sent[source, rank][posted[source] : upto]:
                posts[max(place - 1, 0)].append(_transfer("POST", made, peer=source))
            posted[source] = max(posted[source], upto)
    found: list[Action | Transfer] = []
    for action, before in zip(program, posts, strict=True):
        found += [*before, action]
        target = _target(action, schedule)
        if target is not None:
            found.append(_transfer("SEND", action, peer=target))
    return tuple(found)


def _target(action: Action, schedule: Schedule) -> int | None:
    """The rank that an action's result is sent to; None where it stays, or where nobody needs it."""
    stage = action.stage + (1 if action.kind == "F" else -1)
    if not 0 <= stage < len(schedule.placement):
        return None
    rank = schedule.placement[stage]
    return None if rank == schedule.placement[action.stage] else rank


def _transfer(kind: Literal["SEND", "POST"], made: Action, *, peer: int) -> Transfer:
    return Transfer(kind, "activation" if made.kind == "F" else "gradient", made.stage, made.micro_batch, peer)


def _check_actions(schedule: Schedule) -> None:
    """Each micro-batch goes once through every stage, on the rank that holds it, forward and, if any does, backward."""
    done: set[Action] = set()
    for rank, program in enumerate(schedule.programs):
        for action in program:
            if action in done:
                raise RuntimeError(f"pipeline schedule does {action} twice")
            if not 0 <= action.stage < len(schedule.placement) or schedule.placement[action.stage] != rank:
                raise RuntimeError(f"pipeline schedule has {action} on rank {rank}, which does not hold that stage")
            done.add(action)
    kinds: set[Literal["F", "B"]] = {action.kind for action in done}
    stages = range(len(schedule.placement))
    wanted = {Action(kind, stage, i) for kind in kinds for stage in stages for i in range(schedule.micro_batches)}
    lacking = wanted - done
    if lacking:
        raise RuntimeError(f"pipeline schedule lacks {min(lacking)}")


def _peak_live(program: Sequence[Action]) -> int:
    kept = {action._replace(kind="F") for action in program if action.kind == "B"}
    live = peak = 0
    for action in program:
        live += -1 if action.kind == "B" else action in kept
        peak = max(peak, live)
    return peak
