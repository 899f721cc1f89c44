"""The stages of a run, each with its own data: which one a step belongs to, what is left of it, what it has consumed.

All of it is arithmetic on the config. Steps count from 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pentode.config.schema import DatasetStageArgs


@dataclass(frozen=True)
class Stage:
    """Steps first_step .. last_step read the data of data_stages[index], in sequences of sequence_length tokens."""

    index: int
    name: str
    first_step: int
    last_step: int  # below first_step for a stage that the run ends before
    sequence_length: int

    def remaining(self, done: int) -> int:
        """Steps still to run here, once `done` steps of the run are."""
        return max(0, self.last_step - max(done, self.first_step - 1))

    def consumed(self, done: int, *, global_batch: int) -> int:
        """Samples read here by the first `done` steps of a run that always had this global batch."""
        return max(0, min(done, self.last_step) - (self.first_step - 1)) * global_batch


def plan_stages(data_stages: Sequence[DatasetStageArgs], *, train_steps: int, sequence_length: int) -> list[Stage]:
    """The stages in the order in which they run; `sequence_length` is for those that name none of their own."""
    ordered = sorted(enumerate(data_stages), key=lambda numbered: numbered[1].start_training_step)
    last_steps = [min(args.start_training_step - 1, train_steps) for _, args in ordered[1:]] + [train_steps]
    return [
        Stage(index, args.name, args.start_training_step, last_step, args.sequence_length or sequence_length)
        for (index, args), last_step in zip(ordered, last_steps, strict=True)
    ]


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that `step` belongs to: the last one that has started."""
    return [stage for stage in stages if stage.first_step <= step][-1]
