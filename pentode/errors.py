"""What can go wrong for a user, each with the exit code that launchers rely on.

Codes: 0 done, 64 config or usage, 65 data, 66 no usable checkpoint, 70 internal, 71 out of memory, 74 disk,
75 preempted (saved, start again), 130 interrupted. A message reads `where: what is; what to do`.
"""

import traceback
from collections.abc import Sequence
from typing import Any, Self, TypeVar

OUT_OF_MEMORY = 71
INTERNAL = 70
DISK = 74


class PentodeError(Exception):
    """What is told in its own words, without a traceback. It can be sent to other ranks.

    everywhere  raised alike on all ranks of a run, so that one of them tells it for all
    told        somebody has printed it
    """

    exit_code = INTERNAL
    everywhere = False
    told = False

    @property
    def printed(self) -> str:
        """What a command prints of it."""
        return f"pentode: {self}"

    def said_of(self, ranks: str) -> Self:
        """The same with the ranks that it befell, in words."""
        return _made_again(type(self), f"{ranks}: {self}", self.__dict__)

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (type(self), str(self), self.__dict__)


class ConfigError(PentodeError, ValueError):
    """Anything wrong in what the user wrote, in YAML or on the command line: every problem found, one a line."""

    exit_code = 64

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)

    @property
    def printed(self) -> str:
        return str(self)

    def said_of(self, ranks: str) -> Self:
        return type(self)([f"{ranks}: {problem}" for problem in self.problems])


class DataError(PentodeError, RuntimeError):
    """A dataset or tokenizer that cannot be read, or that does not fit the model."""

    exit_code = 65


class CheckpointError(PentodeError, RuntimeError):
    """No checkpoint that this run could go on from: damaged, of another model, or in another format."""

    exit_code = 66


class NonFiniteError(PentodeError, RuntimeError):
    """The loss or the gradient is not a finite number; the weights are those of the last good step."""

    everywhere = True


class SanityError(PentodeError, RuntimeError):
    """Ranks that must hold the same do not: our bug, or a broken machine."""

    everywhere = True


class StorageError(PentodeError, RuntimeError):
    """The file system refused: full, over quota, read-only, or broken; or the object store."""

    exit_code = DISK


class Preempted(PentodeError, RuntimeError):
    """A signal asked the run to stop; its state is saved, and the same command goes on."""

    exit_code = 75


class Interrupted(PentodeError, RuntimeError):
    """Somebody pressed Ctrl-C; the run's state is saved."""

    exit_code = 130


class RankError(PentodeError, RuntimeError):
    """An error that is none of these, which other ranks must hear of: its message, or of a bug the traceback."""

    @classmethod
    def of(cls, error: Exception) -> Self:
        """What to tell the others, with the exit code that `error` has."""
        code = exit_code(error)
        found = cls("".join(traceback.format_exception(error)).rstrip() if code is None else str(error))
        found.exit_code = INTERNAL if code is None else code
        return found


E = TypeVar("E", bound=PentodeError)


def on_all_ranks(error: E) -> E:
    """`error`, which all ranks raise alike."""
    error.everywhere = True
    return error


def to_json(error: PentodeError) -> dict[str, Any]:
    """An error as JSON holds it."""
    return {"kind": type(error).__name__, "text": str(error), "facts": dict(error.__dict__)}


def from_json(found: dict[str, Any]) -> PentodeError:
    """The error that `to_json` was given; one of a kind that is not known here keeps its exit code."""
    kinds: list[type[PentodeError]] = [PentodeError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    by_name = {kind.__name__: kind for kind in kinds}
    return _made_again(by_name.get(found["kind"], RankError), found["text"], found["facts"])


def in_words(error: BaseException) -> str:
    """An error inside a sentence: ours and the system's speak for themselves, others need their kind."""
    return str(error) if isinstance(error, (PentodeError, OSError)) else f"{type(error).__name__}: {error}"


def exit_code(error: BaseException) -> int | None:
    """The code that a command ends with; None for what can only be our bug."""
    if isinstance(error, PentodeError):
        return error.exit_code
    if isinstance(error, OSError):
        return DISK
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return OUT_OF_MEMORY
    return None


def _made_again(kind: type[E], text: str, facts: dict[str, Any]) -> E:
    """An error by its message and attributes, whatever its own `__init__` asks for."""
    error = kind.__new__(kind, text)
    error.__dict__.update(facts)
    return error
