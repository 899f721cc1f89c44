"""The vocabulary in which a model file says how other libraries name its weights; `checkpoint/names.py` uses it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """Our tensor is theirs, joined along dim 0. `{}` stands for the layer's number, the same one on both sides."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False  # theirs is [in, out], as GPT-2's Conv1D keeps it


@dataclass(frozen=True)
class NameTable:
    """All of a model's rules.

    prefix   what the names of a whole model begin with, and those of its bare trunk do not
    tied     their name of the output layer and of the embedding that it shares, when it does
    ignored  regular expressions of tensors that are no weights: masks, frequencies
    """

    rules: tuple[Rule, ...]
    prefix: str
    tied: tuple[str, str]
    ignored: tuple[str, ...] = ()


def rule(ours: str, *theirs: str, transposed: bool = False) -> Rule:
    """A line of the table."""
    return Rule(ours, theirs, transposed)
