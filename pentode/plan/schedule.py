"""The pipeline that a config gives: its schedule, stages and costs, as data and as lines of text. No torch here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from pentode.config.schema import Config
from pentode.errors import ConfigError
from pentode.parallel.pipeline.partition import stage_costs, stage_layers
from pentode.parallel.pipeline.schedules import Action, Schedule, make_schedule
from pentode.parallel.pipeline.simulate import Timeline, Transfer, simulate, with_transfers

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class PipelinePlan:
    """A config's pipeline.

    layers    of each stage
    costs     of each stage's forward, in units of the mean of all stages
    timeline  what the schedule takes with these costs, in the same units
    even      what it would take if all stages cost the same
    programs  each rank's actions and messages, in order
    """

    schedule: Schedule
    layers: Sequence[range]
    costs: Sequence[float]
    timeline: Timeline
    even: Timeline
    programs: Sequence[Sequence[Action | Transfer]]

    @property
    def ranks(self) -> int:
        """Pipeline ranks, pp."""
        return len(self.schedule.programs)

    @property
    def stages_per_rank(self) -> int:
        """How many stages each rank holds."""
        return len(self.layers) // self.ranks

    @cached_property
    def turns(self) -> list[int]:
        """Of each stage, which of its rank's stages it is, from 0."""
        held = dict.fromkeys(range(self.ranks), 0)
        found = []
        for rank in self.schedule.placement:
            found.append(held[rank])
            held[rank] += 1
        return found

    @cached_property
    def letters(self) -> list[str]:
        """Of each stage, what tells it from its rank's others: a, b, ..., z, aa; empty if each rank has one."""
        return [_letters(turn) if self.stages_per_rank > 1 else "" for turn in self.turns]


def plan_pipeline(config: Config) -> PipelinePlan:
    """What a run of this config will do. Raises ConfigError if the cut needs a vocabulary size that the data tell."""
    shape, p = config.model.model_config, config.parallelism
    micro_batches, length = config.tokens.batch_accumulation_per_replica, config.tokens.sequence_length
    schedule = make_schedule(p.pp_engine, pp=p.pp, micro_batches=micro_batches, stages_per_rank=p.stages_per_rank)
    stages = len(schedule.placement)
    layers, costs = [range(shape.num_layers)], [1.0]
    if stages > 1:
        if shape.vocab_size < 1:
            raise ConfigError(
                [
                    f"model.model_config.vocab_size: {shape.vocab_size}, to be taken from the data, but the cut into "
                    f"{stages} stages depends on it; add model.model_config.vocab_size=N after the file"
                ]
            )
        layers = stage_layers(shape, stages=stages, sequence_length=length)
        found = stage_costs(shape, layers, sequence_length=length)
        costs = [cost * stages / sum(found) for cost in found]
    timeline = simulate(schedule, stage_costs=costs)
    return PipelinePlan(schedule, layers, costs, timeline, simulate(schedule), with_transfers(schedule))


def facts(plan: PipelinePlan) -> Iterator[str]:
    """Lines of `name  value`, and a table of the stages."""
    for name, value in _facts(plan):
        yield f"{name:<22} {value}"
    yield ""
    yield "stage   rank   layers      share of cost"
    for stage, (own, cost) in enumerate(zip(plan.layers, plan.costs, strict=True)):
        span = f"{own[0]}-{own[-1]}" if len(own) > 1 else f"{own[0]}"
        rank = f"{plan.schedule.placement[stage]}"
        ends = [word for word, at in (("embedding", 0), ("output layer", len(plan.layers) - 1)) if at == stage]
        with_ends = f"   with {' and '.join(ends)}" if ends else ""
        share = cost / len(plan.costs)
        yield f"{stage:>5}   {rank:>4}{plan.letters[stage]:<2} {span:<9} ({len(own)}){share:>12.1%}{with_ends}"


def _facts(plan: PipelinePlan) -> Iterator[tuple[str, str]]:
    ranks, each = plan.ranks, plan.stages_per_rank
    yield (
        "schedule",
        f"{plan.schedule.name}: {_count(ranks, 'rank')}, {_count(each, 'stage')} on each, "
        f"{_count(plan.schedule.micro_batches, 'micro-batch')} a step",
    )
    yield (
        "bubble",
        f"ranks idle for {_share(plan.even)} of a step if stages cost the same, {_share(plan.timeline)} as they are",
    )
    live = " ".join(map(str, plan.timeline.peak_live))
    over = "" if each == 1 else f", summed over its {each} stages"
    yield "peak live", f"micro-batches between forward and backward, by rank{over}: {live}"
    sent = [step for program in plan.programs for step in program if step.kind == "SEND"]
    activations = sum(step.what == "activation" for step in sent)
    told = f": {activations} of activations, {len(sent) - activations} of gradients" if sent else ""
    yield "messages", f"{len(sent) or 'none'} a step{told}"


def program_lines(plan: PipelinePlan, *, width: int) -> Iterator[str]:
    """Each rank's program, in lines of up to `width` characters."""
    yield "F0@1 is the forward of micro-batch 0 through stage 1; POST begins to receive"
    for rank, program in enumerate(plan.programs):
        yield f"rank {rank}"
        line = ""
        for step in program:
            if line and len(line) + len(f", {step},") > width:
                yield f"{line},"
                line = ""
            line = f"{line}, {step}" if line else f"  {step}"
        yield line


def _share(timeline: Timeline) -> str:
    return f"{max(0.0, timeline.bubble):.1%}"  # rounding may leave less than nothing


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}{'es' if word.endswith('ch') else 's'}"


def _letters(number: int) -> str:
    found = ""
    while number >= 0:
        number, place = number // len(LETTERS) - 1, number % len(LETTERS)
        found = LETTERS[place] + found
    return found
