"""YAML, overrides and dicts into a Config; every problem at once, each with its place."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pentode.config import check, legacy, yaml_reader
from pentode.config.kind import settle
from pentode.config.schema import Config
from pentode.config.tree import (
    COMMAND_LINE,
    Items,
    Place,
    Problem,
    Section,
    assign,
    lay_under,
    path_of,
    place_of,
    tree_of,
)
from pentode.config.validate import validate
from pentode.errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = (), *, base: dict[str, Any] | None = None) -> Config:
    """The config in a YAML file, changed by `a.b.c=value` overrides; `base` says what the file does not.

    Overrides and base use the full schema's paths, whatever spelling the file uses. Raises ConfigError with every
    problem: `file:line: dotted.path: what is; what to do`.
    """
    return load_with_notes(path, overrides, base=base)[0]


def load_with_notes(
    path: Path, overrides: Sequence[str] = (), *, base: dict[str, Any] | None = None
) -> tuple[Config, list[str]]:
    """The config, and a line for each thing that its author should know though it is not wrong."""
    source = str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError([f"{source}: {error.strerror or error}; give the path of a YAML file"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{source}: byte {error.start} is not UTF-8; is it a YAML file?"]) from None
    tree = yaml_reader.read(text, source=source)
    if not isinstance(tree, Section):
        raise ConfigError([f"{source}: holds no sections; a config starts with `general:`"])
    return _config(tree, overrides, base=base, source=source)


def config_from_dict(data: dict[str, Any]) -> Config:
    """The config that plain dicts and lists describe, in any spelling that a file may have. `data` is not changed."""
    return _config(tree_of(data), (), base=None, source=None)[0]


def _config(
    tree: Section, overrides: Sequence[str], *, base: dict[str, Any] | None, source: str | None
) -> tuple[Config, list[str]]:
    former = legacy.translate(tree)
    problems = list(former.problems)
    if base is not None:
        lay_under(tree, tree_of(base))
    not_applied = list(_override(tree, overrides))
    _sort_stages(tree)
    problems.extend(settle(tree, Config))
    config, found = validate(Config, tree, more_words=former.words)
    problems.extend(found)
    if config is None:
        problems.extend(check.find_in_part(tree, wrong={problem.path for problem in problems}))
    else:
        problems.extend(check.find(config))
    if not_applied or problems or config is None:
        raise ConfigError(not_applied + _lines(tree, problems, source=source))
    notes = former.notes + check.warnings(config)
    return config, [f"{source}: {note}" if source else note for note in notes]


def _lines(tree: Section, problems: Sequence[Problem], *, source: str | None) -> list[str]:
    """Each problem once, behind its place, in the file's order."""
    default = Place(source) if source else None
    placed = [(place_of(tree, problem.path, default=default), problem) for problem in dict.fromkeys(problems)]
    placed.sort(key=lambda item: (item[0] or Place(""), str(item[1])))
    return [f"{place}: {problem}" if place else str(problem) for place, problem in placed]


def _override(tree: Section, overrides: Sequence[str]) -> Iterator[str]:
    """Apply `a.b.c=value` to the tree; a line for each that cannot be."""
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            yield f"{COMMAND_LINE}: {override}: not an override; write section.key=value"
            continue
        try:
            value = tree_of(yaml_reader.read(text, source=f"{COMMAND_LINE}: {dotted}"))
        except ConfigError as error:
            yield from error.problems
            continue
        in_the_way = assign(tree, path_of(dotted), value, place=Place(COMMAND_LINE))
        if in_the_way:
            yield f"{COMMAND_LINE}: {dotted}: {in_the_way}"


def _sort_stages(tree: Section) -> None:
    """Put stages in order of their first step, with their places, as Nanotron does."""
    stages = tree.get("data_stages")
    if not isinstance(stages, Items):
        return
    starts: list[Any] = [stage.get("start_training_step") if isinstance(stage, Section) else None for stage in stages]
    if all(type(start) is int for start in starts):
        order = sorted(range(len(stages)), key=lambda i: starts[i])
        places: dict[str | int, Place] = {
            new: stages.places[old] for new, old in enumerate(order) if old in stages.places
        }
        stages[:] = [stages[i] for i in order]
        stages.places = places
