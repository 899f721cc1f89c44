"""Optimizer groups: which parameters are stepped with which weight decay."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pentode.errors import ConfigError

WHERE = "optimizer.weight_decay_exclude_named_params"


@dataclass(frozen=True)
class Group:
    """Names of parameters that are stepped alike."""

    names: tuple[str, ...]
    weight_decay: float


def weight_decay_groups(parameters: Iterable[str], *, weight_decay: float, exclude: Sequence[str] = ()) -> list[Group]:
    """The decayed parameters, and those that match one of the `exclude` regexes, which are not decayed.

    As in Nanotron everything decays by default, norms and biases too, and a regex is matched from the start of the full
    name (re.match). The habit of GPT-2's users, matrices only, is written [".*norm\\..*", ".*bias"].
    Raises ConfigError naming each pattern that is no regex or that matches nothing.
    """
    names = list(parameters)
    patterns = _compiled(exclude, names)
    kept = [name for name in names if not any(pattern.match(name) for pattern in patterns)]
    excluded = [name for name in names if name not in set(kept)]
    groups = [Group(tuple(kept), weight_decay), Group(tuple(excluded), 0.0)]
    return [group for group in groups if group.names]


def _compiled(exclude: Sequence[str], names: Sequence[str]) -> list[re.Pattern[str]]:
    patterns, problems = [], []
    for i, text in enumerate(exclude):
        try:
            pattern = re.compile(text)
        except re.error as error:
            problems.append(f"{WHERE}.{i}: {text!r} is not a regular expression: {error}")
            continue
        patterns.append(pattern)
        if not any(pattern.match(name) for name in names):
            problems.append(f"{WHERE}.{i}: {text!r} matches no parameter; near names: {', '.join(_near(text, names))}")
    if problems:
        raise ConfigError(problems)
    return patterns


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """Up to three parameter names that look like the pattern; layers are alike, so one of each kind is tried."""
    kinds = {re.sub(r"\.\d+\.", ".N.", name): name for name in reversed(names)}
    literal = re.sub(r"\\(.)|\.[*+]|[\^$()\[\]|?]", r"\1", pattern)
    return difflib.get_close_matches(literal, kinds.values(), n=3, cutoff=0.0)
