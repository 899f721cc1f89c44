"""A restricted YAML reader: what it reads is text, numbers, true, false, null, lists and sections, each with its line.

Built on PyYAML's events alone, so that nothing is constructed that is not listed here: no tags, aliases, merge keys,
dates, octal or sexagesimal numbers; `yes` and `on` are text, 3e-4 is a number; a key given twice is refused.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from pentode.config.tree import Items, Place, Section
from pentode.errors import ConfigError

MAX_BYTES = 1 << 20  # a config is a few KiB; PyYAML reads about 100 KiB a second
MAX_DEPTH = 32

WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
WORDS |= {word: value for value in (True, False) for word in (str(value), str(value).lower(), str(value).upper())}
WORDS |= {sign + word: float(sign + "inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")}
WORDS |= dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan)
INTEGER = re.compile(r"[-+]?[0-9](?:_?[0-9]){0,17}")  # at most 18 digits: fits 64 bits, and costs nothing to convert
FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]{1,4})?")


def read(text: str, *, source: str) -> Any:
    """The one document in `text`: a Section, Items or a scalar.

    Raises ConfigError with `source:line` for anything that is not such YAML.
    """
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise ConfigError([f"{source}: larger than {MAX_BYTES >> 20} MiB; is it a config?"])
    try:
        return _Reader(text, source).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError([f"{Place(source, mark.line + 1 if mark else 0)}: {what}; not YAML"]) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"{source}: {' '.join(str(error).split())}; not YAML"]) from None


def scalar(text: str) -> Any:
    """What a plain, unquoted word means."""
    if text in WORDS:
        return WORDS[text]
    if INTEGER.fullmatch(text):
        return int(text)
    return float(text) if FLOAT.fullmatch(text) else text


class _Reader:
    """Builds the tree from PyYAML's flat stream of events."""

    def __init__(self, text: str, source: str) -> None:
        self.events: Iterator[Any] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self.source = source

    def document(self) -> Any:
        next(self.events)  # the stream starts
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return None
        found = self.value(next(self.events), depth=0)
        next(self.events)  # the document ends
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise self.refusal(after, "a second document starts; one file holds one config")
        return found

    def value(self, event: Any, *, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            raise self.refusal(event, f"*{event.anchor} is an alias; write the value out")
        if event.tag is not None:
            raise self.refusal(event, f"{event.tag} is a tag; tags are not read")
        if depth > MAX_DEPTH:
            raise self.refusal(event, f"nested deeper than {MAX_DEPTH}; a config is not")
        if isinstance(event, yaml.MappingStartEvent):
            return self.section(depth=depth)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.items(depth=depth)
        event.value.encode()  # a lone surrogate, written as an escape, is no text
        return scalar(event.value) if event.style is None else event.value

    def section(self, *, depth: int) -> Section:
        made = Section()
        while not isinstance(key := next(self.events), yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent) or key.tag is not None:
                raise self.refusal(key, "a key must be a word")
            if key.value in made:
                raise self.refusal(key, f"{key.value!r} is given twice, first at line {made.places[key.value].line}")
            made.put(key.value, self.value(next(self.events), depth=depth + 1), self.place(key))
        return made

    def items(self, *, depth: int) -> Items:
        made = Items()
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            made.places[len(made)] = self.place(event)
            made.append(self.value(event, depth=depth + 1))
        return made

    def place(self, event: Any) -> Place:
        return Place(self.source, event.start_mark.line + 1)

    def refusal(self, event: Any, text: str) -> ConfigError:
        return ConfigError([f"{self.place(event)}: {text}"])
