"""Whether all ranks run the same thing: one config, one version of what computes."""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from pentode.config.dump import to_dict
from pentode.config.schema import Config
from pentode.config.validate import shown
from pentode.dist.collectives import gather_objects
from pentode.dist.mesh import Axis
from pentode.dist.together import ranks_in_words
from pentode.errors import ConfigError, on_all_ranks
from pentode.version import VERSION

ABSENT = "absent"
SHOWN = 3  # values of one key; each of a thousand ranks may have its own


def check_agreement(config: Config, world: Axis) -> None:
    """Raise the same ConfigError on every rank if ranks differ; all ranks there are, `world`, must call.

    Ranks that differ would compute nonsense, or wait for each other for ever.
    """
    ranks = gather_objects({"versions": _versions(), "config": dict(_values(to_dict(config)))}, world)
    remedies = {"versions": "install the same on all hosts", "config": "start all ranks with the same file"}
    for name, remedy in remedies.items():  # versions first: another version may have another config
        found = _difference([rank[name] for rank in ranks])
        if found is not None:
            raise on_all_ranks(ConfigError([f"{name}: {found}; {remedy}"]))


def _versions() -> dict[str, str]:
    return {"pentode": VERSION, "torch": str(torch.__version__), "python": platform.python_version()}


def _values(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Each value in a tree as text under its dotted path; what holds others comes before them."""
    if path:
        yield path, _text(node)
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from _values(child, f"{path}.{key}".removeprefix("."))


def _text(node: Any) -> str:
    """A value in full, where `shown` would cut it: what differs may be its end."""
    return shown(node) if isinstance(node, dict | list) else repr(node) if isinstance(node, str) else json.dumps(node)


def _difference(ranks: Sequence[Mapping[str, str]]) -> str | None:
    """The first key on which ranks differ, its values and whose they are."""
    for key in dict.fromkeys(key for rank in ranks for key in rank):
        holders: dict[str, list[int]] = {}
        for number, rank in enumerate(ranks):
            holders.setdefault(rank.get(key, ABSENT), []).append(number)
        if len(holders) > 1:
            values = [f"{value} on {ranks_in_words(numbers)}" for value, numbers in list(holders.items())[:SHOWN]]
            more = f", and {len(holders) - SHOWN} more values" if len(holders) > SHOWN else ""
            return f"{key} is {', '.join(values)}{more}"
    return None
