"""pydantic's findings as sentences: rewritten by error type, with the dotted path and the nearest valid key."""

import difflib
import json
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from pentode.config.section import fields_of, is_section, marker, members
from pentode.config.tree import Path, Problem, tree_of
from pentode.errors import ConfigError

T = TypeVar("T")

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "dict_type": "a section of names and values",
    "dataclass_type": "a section",
}
BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
UNKNOWN_KEY = "unexpected_keyword_argument"
NO_KIND = ("union_tag_not_found", "union_tag_invalid")  # config/kind.py has already said so, in its words


@cache
def adapter(kind: type[T]) -> TypeAdapter[T]:
    """pydantic's validator of a section, built once."""
    return TypeAdapter(kind)


def build(kind: type[T], data: dict[str, Any], *, where: str) -> T:
    """A section from plain data. Raises ConfigError, each problem beginning with `where`."""
    made, problems = validate(kind, tree_of(data))
    if made is None:
        raise ConfigError([f"{where}: {problem}" for problem in problems])
    return made


def validate(kind: type[T], tree: Any, *, more_words: Sequence[str] = ()) -> tuple[T | None, list[Problem]]:
    """The section that `tree` describes, or None and every problem found. `more_words`: other keys worth suggesting."""
    try:
        return adapter(kind).validate_json(json.dumps(tree, default=str)), []
    except ValidationError as error:
        return None, list(_problems(kind, error, more_words))


def shown(value: Any) -> str:
    """A value as its author wrote it, more or less, and not too long."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _problems(kind: Any, error: ValidationError, more_words: Sequence[str]) -> Iterator[Problem]:
    wrong_types: dict[Path, tuple[Any, list[str]]] = {}  # a value that may be of several types fails once for each
    for found in error.errors(include_url=False):
        path, owner = _follow(kind, found["loc"])
        type_, value, context = found["type"], found["input"], found.get("ctx", {})
        if type_ in NO_KIND:
            continue
        if type_ == UNKNOWN_KEY:
            yield Problem(path, f"unknown key; {_nearest(kind, owner, path, more_words)}")
        elif type_ == "missing":
            yield Problem(path, f"missing; needed: {fields_of(owner)[str(path[-1])].description}")
        elif type_ in EXPECTED:
            wrong_types.setdefault(path, (value, []))[1].append(EXPECTED[type_])
        elif type_ in BOUNDS:
            bound, words = BOUNDS[type_]
            yield Problem(path, f"{shown(value)}; must be {words} {context[bound]:g}")
        elif type_ == "literal_error":
            yield Problem(path, _not_a_choice(value, choices(fields_of(owner)[str(path[-1])].annotation)))
        elif type_ == "too_short":
            yield Problem(path, f"empty; must have at least {context['min_length']}")
        else:
            yield Problem(path, f"{shown(value)}; {found['msg']}")
    for path, (value, expected) in wrong_types.items():
        inside = any(len(other) > len(path) and other[: len(path)] == path for other in wrong_types)
        if not inside:
            yield Problem(path, f"{shown(value)} is not {' or '.join(expected)}")


def _follow(kind: Any, location: tuple[int | str, ...]) -> tuple[Path, Any]:
    """A pydantic location without the names of alternatives in it, and the section that its last key belongs to."""
    path: list[int | str] = []
    current, owner = (kind,), kind
    for part in location:
        if len(current) > 1:  # one of several types: this part names which
            current = tuple(m for m in current if is_section(m) and marker(m)[1] == part)
            continue
        path.append(part)
        here = current[0] if current else None
        if is_section(here):
            owner = here
            current = members(fields_of(here)[str(part)].annotation) if part in fields_of(here) else ()
        else:
            arguments = get_args(here)
            current = members(arguments[-1]) if get_origin(here) in (list, dict) and arguments else ()
    return tuple(path), owner


def choices(annotation: Any) -> tuple[Any, ...]:
    """The words that a Literal field allows."""
    return tuple(word for m in members(annotation) if get_origin(m) is Literal for word in get_args(m))


def _not_a_choice(value: Any, words: tuple[Any, ...]) -> str:
    close = difflib.get_close_matches(str(value), [str(word) for word in words], 1)
    hint = f"; did you mean {close[0]}?" if close and len(words) > 1 else ""
    return f"{shown(value)}; must be {' or '.join(shown(word).strip(chr(39)) for word in words)}{hint}"


def _nearest(kind: Any, owner: Any, path: Path, more_words: Sequence[str]) -> str:
    """What to write instead of an unknown key: the same key elsewhere, else the nearest here, else all keys here."""
    key, here = str(path[-1]), list(fields_of(owner))
    elsewhere = [dotted for dotted in all_keys(kind) if dotted.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:2])}?"
    if close := difflib.get_close_matches(key, [*here, *more_words], 1):
        return f"did you mean {close[0]}?"
    return f"the keys here are {', '.join(here)}"


@cache
def all_keys(kind: Any, prefix: str = "") -> tuple[str, ...]:
    """The dotted path of every field below a section, list indices as 0."""
    found: list[str] = []
    for name, field in fields_of(kind).items():
        found.append(prefix + name)
        for member in members(field.annotation):
            inner, dot = (get_args(member)[0], ".0.") if get_origin(member) is list else (member, ".")
            if is_section(inner):
                found.extend(all_keys(inner, prefix + name + dot))
    return tuple(dict.fromkeys(found))
