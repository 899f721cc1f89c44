"""What can go wrong for a user, each with the exit code that launchers rely on.

Codes: 0 done, 64 config or usage, 65 data, 66 no usable checkpoint, 70 internal, 71 out of memory, 74 disk,
75 preempted (saved, start again), 130 interrupted. A message reads `where: what is; what to do`.
"""

from collections.abc import Sequence

OUT_OF_MEMORY = 71
INTERNAL = 70


class ConfigError(ValueError):
    """Anything wrong in what the user wrote, in YAML or on the command line: every problem found, one a line."""

    exit_code = 64

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class DataError(RuntimeError):
    """A dataset or tokenizer that cannot be read, or that does not fit the model."""

    exit_code = 65


class CheckpointError(RuntimeError):
    """No checkpoint that this run could go on from: damaged, of another model, or in another format."""

    exit_code = 66


class RankwideError(RuntimeError):
    """Raised alike on all ranks of a run; `told` once one of them has printed it."""

    exit_code = INTERNAL
    told = False


class NonFiniteError(RankwideError):
    """The loss or the gradient is not a finite number; the weights are those of the last good step."""


class SanityError(RankwideError):
    """Ranks that must hold the same do not: our bug, or a broken machine."""


class StorageError(RuntimeError):
    """The file system refused: full, over quota, read-only, or broken."""

    exit_code = 74


class Preempted(RuntimeError):
    """A signal asked the run to stop; its state is saved, and the same command goes on."""

    exit_code = 75


class Interrupted(RuntimeError):
    """Somebody pressed Ctrl-C; the run's state is saved."""

    exit_code = 130
