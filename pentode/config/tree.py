"""A config before it is checked: mappings and lists that remember where each value was written."""

from collections.abc import Iterable
from typing import Any, NamedTuple

Path = tuple[str | int, ...]
COMMAND_LINE = "command line"


class Place(NamedTuple):
    """Where something was written: a file's line (0: the file as a whole), or the command line."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


class Problem(NamedTuple):
    """One thing wrong: which value, and a sentence without it."""

    path: Path
    text: str

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.path))}: {self.text}" if self.path else self.text


class Section(dict[str, Any]):
    """A mapping, and the place of each of its keys that was written down."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str | int, Place] = {}

    def put(self, key: str, value: Any, place: Place | None) -> None:
        """Set a key that was written at `place`."""
        self[key] = value
        if place is not None:
            self.places[key] = place

    def take(self, key: str) -> tuple[Any, Place | None]:
        """Remove a key; its value and its place."""
        return self.pop(key), self.places.pop(key, None)


class Items(list[Any]):
    """A list, and the place of each of its items that was written down."""

    def __init__(self, items: Iterable[Any] = ()) -> None:
        super().__init__(items)
        self.places: dict[str | int, Place] = {}


def tree_of(data: Any) -> Any:
    """A copy of plain dicts and lists as a tree without places."""
    if isinstance(data, dict):
        made = Section()
        made.update({str(key): tree_of(value) for key, value in data.items()})
        return made
    return Items(map(tree_of, data)) if isinstance(data, list | tuple) else data


def path_of(dotted: str) -> Path:
    """`data_stages.0.name` as ("data_stages", 0, "name")."""
    return tuple(int(part) if part.isdecimal() else part for part in dotted.split("."))


def place_of(tree: Any, path: Path, *, default: Place | None = None) -> Place | None:
    """Where the deepest part of `path` that exists was written."""
    for part in path:
        default = getattr(tree, "places", {}).get(part, default)
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            break
    return default


def get(tree: Any, dotted: str) -> Any:
    """The value at a dotted path, None where there is none."""
    for key in dotted.split("."):
        if not isinstance(tree, Section) or key not in tree:
            return None
        tree = tree[key]
    return tree


def assign(tree: Section, path: Path, value: Any, *, place: Place | None) -> str | None:
    """Set the value at `path`, making sections on the way where there is nothing; what is in the way, or None."""
    node: Any = tree
    for depth, part in enumerate(path):
        if isinstance(node, Items):
            if not isinstance(part, int) or part >= len(node):
                return f"{'.'.join(map(str, path[:depth]))} is a list of {len(node)}; count its items from 0"
        elif not isinstance(node, Section):
            return f"{'.'.join(map(str, path[:depth]))} is not a section"
        key: Any = part if isinstance(node, Items) else str(part)
        if depth == len(path) - 1:
            node[key] = value
            if place is not None:
                node.places[key] = place
        elif isinstance(node, Section) and node.get(str(key)) is None:
            node.put(str(key), Section(), place)
        node = node[key]
    return None


def lay_under(tree: Section, base: Section) -> None:
    """Fill in from `base` what `tree` does not say, section by section."""
    for key, value in base.items():
        if key not in tree:
            tree.put(key, value, base.places.get(key))
        elif isinstance(tree[key], Section) and isinstance(value, Section):
            lay_under(tree[key], value)
