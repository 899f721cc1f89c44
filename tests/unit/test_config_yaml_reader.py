"""The restricted YAML reader: what it reads, what it refuses, and that it never fails in another way."""

import math
import re

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pentode.config.dump import Dumper
from pentode.config.tree import Items, Place, Section
from pentode.config.yaml_reader import MAX_BYTES, MAX_DEPTH, read
from pentode.errors import ConfigError


def value(text: str) -> object:
    return read(f"key: {text}", source="f.yaml")["key"]


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as error:
        read(text, source="f.yaml")
    (problem,) = error.value.problems
    return problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3e-4", 3e-4),
        ("1.0e-05", 1e-5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.5E+2", -50.0),
        ("100_000", 100_000),
        ("-7", -7),
        ("010", 10),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("9" * 19, "9" * 19),
        ("2024-01-01", "2024-01-01"),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("Null", None),
        ('"null"', "null"),
        ("'3'", "3"),
        ("|\n  two\n  lines", "two\nlines"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1__0", "1__0"),
    ],
)
def test_plain_words_mean_what_they_look_like(text: str, expected: object) -> None:
    assert value(text) == expected
    assert type(value(text)) is type(expected)


def test_not_a_number_and_infinity_are_read_so_that_the_schema_can_refuse_them() -> None:
    assert math.isnan(value(".nan"))
    assert value("-.inf") == -math.inf
    assert value("1e999") == math.inf


def test_every_key_and_item_knows_its_line() -> None:
    tree = read("a: 1\nb:\n  c: [x, y]\n  d:\n  - 1\n  - e: 2\n", source="f.yaml")
    assert isinstance(tree, Section)
    assert tree.places == {"a": Place("f.yaml", 1), "b": Place("f.yaml", 2)}
    assert isinstance(tree["b"]["d"], Items)
    assert tree["b"]["d"].places[1] == Place("f.yaml", 6)
    assert tree["b"]["d"][1].places["e"] == Place("f.yaml", 6)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3", 3, "'a' is given twice, first at line 1"),
        ("a: &x 1\nb: *x", 2, "*x is an alias"),
        ("a:\n  !!python/object/apply:os.system [ls]", 2, "is a tag"),
        ("a: !!timestamp 2024-01-01", 1, "is a tag"),
        ("? [a, b]\n: 1", 1, "a key must be a word"),
        ("a: 1\n---\nb: 2", 2, "a second document"),
        ("[" * (MAX_DEPTH + 2), 1, "nested deeper"),
        ("a: [1, 2", 1, "not YAML"),
        ("a: 'x", 1, "not YAML"),
        ("\tb: 1", 1, "not YAML"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_line(text: str, line: int, words: str) -> None:
    assert refusal(text).startswith(f"f.yaml:{line}: ")
    assert words in refusal(text)


@pytest.mark.parametrize(
    "text", ['a: "\\ud800"', 'a: "\\UFFFFFFFF"', "a: \x00", "%YAML 9" + "9" * 5000 + ".1\n---\na: 1"]
)
def test_text_that_is_no_text_is_refused(text: str) -> None:
    assert refusal(text).startswith("f.yaml")


def test_a_huge_file_is_refused_before_it_is_read() -> None:
    assert "larger than 1 MiB" in refusal("#" * (MAX_BYTES + 1))


def test_an_empty_text_is_nothing() -> None:
    assert read("", source="f.yaml") is None
    assert read("# only a comment\n", source="f.yaml") is None


WORDS = "a [ ] { } , &x *x !!int ! | > ' \" \\x # --- ... << % @ ` 1e5 null = 0o7 \\U0011FFFF ~"
PIECES = st.sampled_from([*re.split(" ", WORDS), ": ", "- ", "\n", "  ", "? ", "\t", "\ufeff", "\x85"])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=25).map("".join))
def test_any_text_is_read_or_refused_in_our_words(text: str) -> None:
    try:
        read(text, source="f.yaml")
        problem = "f.yaml"
    except ConfigError as error:
        (problem,) = error.problems
    assert problem.startswith("f.yaml")
    assert "\n" not in problem


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**17), 10**17), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(PLAIN)
@example({"\x85": ["\u2028", "1e-3", "null", "010", "\ufeff"], "3": "~"})
def test_what_our_dumper_writes_our_reader_reads(data: object) -> None:
    text = yaml.dump(data, Dumper=Dumper, allow_unicode=True, width=1 << 20)
    assert read(text, source="f.yaml") == data
