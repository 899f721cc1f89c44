"""docs/config.md, made from the schema: `python -m pentode.config.manual > docs/config.md`."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from pentode.config.check import NOT_BUILT
from pentode.config.kind import NOT_BUILT as KINDS_NOT_BUILT
from pentode.config.legacy import ANYTHING, FLAT, INERT
from pentode.config.schema import Config
from pentode.config.section import fields_of, is_section, marker, members, nullable
from pentode.config.validate import shown

INTRODUCTION = """\
# The config

Made from `pentode/config/schema.py` by `python -m pentode.config.manual > docs/config.md`; do not edit.

A run is one YAML file; sections and keys are Nanotron's. Change a value without editing the file by its full path,
`pentode train FILE tokens.train_steps=60 data_stages.0.data.seed=1`; items of a list count from 0, a whole section is
`{key: value}`. `pentode check FILE` says what a file means or all that is wrong with it; `pentode schema > schema.json`
gives editors completion.

The YAML read is plain: `3e-4` is a number, `yes` and `on` are text, a key given twice is an error; no tags, no aliases.
A null stands for the default wherever null is not listed as a value. A section that may be of several kinds is known by
its `type` (or `name`), by a tag such as `is_llama_config: true`, or by its keys.
"""
NAMES = {int: "whole number", float: "number", bool: "true, false", str: "text", Path: "path", dict: "section"}
BOUNDS = {"ge": "at least", "gt": "more than", "lt": "less than", "le": "at most"}


def manual() -> str:
    """The text of docs/config.md."""
    return "\n".join([INTRODUCTION, *_sections(Config, ""), *_not_built(), *_inert(), *_flat()]).rstrip() + "\n"


def _sections(kind: Any, path: str, title: str = "") -> Iterator[str]:
    """A table for a section, then those inside it."""
    yield f"## {title or path or 'All sections'}\n"
    yield f"{kind.__doc__.strip()} (`{kind.__name__}`)\n"
    yield from _table(["key", "type", "default", "meaning"], (_row(name, f) for name, f in fields_of(kind).items()))
    for name, field in fields_of(kind).items():
        below = f"{path}.{name}".removeprefix(".")
        for inner, inner_path, is_one_of_several in _inside(field, below):
            word, value = marker(inner) if is_one_of_several else ("", "")
            yield from _sections(inner, inner_path, f"{inner_path}, {word}: {value}" if word else "")


def _inside(field: FieldInfo, path: str) -> Iterator[tuple[Any, str, bool]]:
    """The sections that a field may hold, each with its path, and whether there are several kinds."""
    found = [(get_args(m)[0], f"{path}.0") if get_origin(m) is list else (m, path) for m in members(field.annotation)]
    kinds = [(kind, where) for kind, where in found if is_section(kind)]
    for kind, where in kinds:
        yield kind, where, len(kinds) > 1


def _row(name: str, field: FieldInfo) -> list[str]:
    default = "**required**" if field.is_required() else _code(field.get_default(call_default_factory=True))
    return [f"`{name}`", _type_of(field), default, field.description or ""]


def _type_of(field: FieldInfo) -> str:
    names = [_name(member) for member in members(field.annotation)]
    constraints = [
        *field.metadata,
        *(m for part in get_args(field.annotation) for m in getattr(part, "__metadata__", ())),
    ]
    constraints += [inner for c in constraints if isinstance(c, FieldInfo) for inner in c.metadata]
    bounds = [f"{words} {getattr(c, key):g}" for c in constraints for key, words in BOUNDS.items() if hasattr(c, key)]
    return ", ".join([" or ".join(dict.fromkeys(names)), *dict.fromkeys(bounds)]) + (
        ", or null" if nullable(field.annotation) else ""
    )


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(_code(word) for word in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {' or '.join(_name(m) for m in members(get_args(kind)[0]))}"
    if get_origin(kind) is dict:
        return "section of names and values"
    return NAMES.get(kind, f"[{kind.__name__}](#{_anchor(kind)})" if is_section(kind) else str(kind))


def _anchor(kind: Any) -> str:
    """GitHub's anchor of a section's heading."""
    for line in _headings():
        if line[1] is kind:
            return re.sub(r"[^a-z0-9_ -]", "", line[0].lower()).replace(" ", "-")
    return ""


def _headings(kind: Any = Config, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in fields_of(kind).items():
        for inner, inner_path, several in _inside(field, f"{path}.{name}".removeprefix(".")):
            yield (f"{inner_path}, {': '.join(marker(inner))}" if several else inner_path), inner
            yield from _headings(inner, inner_path)


def _not_built() -> Iterator[str]:
    yield "## Not built yet\n"
    yield "Read, and refused by name where the value is not one that works.\n"
    rows = [[f"`{path}`", what, ", ".join(_code(word) for word in works)] for path, (works, what) in NOT_BUILT.items()]
    rows += [[f"`model.model_config`, is_{tag}_config", what, "llama, gpt2"] for tag, what in KINDS_NOT_BUILT.items()]
    yield from _table(["key", "what", "works"], rows)


def _inert() -> Iterator[str]:
    yield "## Keys without effect\n"
    yield "They are in Nanotron's files; accepted at the values that change nothing.\n"
    rows = (
        [
            f"`{path}`",
            ", ".join("any value" if value is ANYTHING else _code(value) for value in inert.values),
            inert.why,
        ]
        for path, inert in INERT.items()
    )
    yield from _table(["key", "accepted", "because"], rows)


def _flat() -> Iterator[str]:
    yield "## The nanoGPT2 guide's flat keys\n"
    yield "A file of these alone is a GPT-2 run; `vocab_size: 256` reads bytes, others read characters.\n"
    rows = ([f"`{key}`", ", ".join(f"`{path}`" for path in paths)] for key, paths in FLAT.items())
    yield from _table(["key", "becomes"], rows)


def _table(header: list[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


def _code(value: Any) -> str:
    if is_section(type(value)):
        return "as below"
    return f"`{shown(value).strip(chr(39))}`" if value != [] else "`[]`"


if __name__ == "__main__":
    sys.stdout.write(manual())
