"""A Config in which what is wrong is absent, so that the rules between sections can still judge the rest."""

from collections.abc import Callable, Collection
from typing import Any, NoReturn

from pydantic import BeforeValidator

from pentode.config.section import fields_of, is_section, marker, members
from pentode.config.tree import Path


class Unknown(Exception):
    """A rule asked for a value that is wrong or missing; it cannot judge."""


def _refuse(*_: object) -> NoReturn:
    raise Unknown


class Absent:
    """Stands where a value is wrong: whatever is asked of it raises Unknown."""

    __getattr__ = __bool__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __mod__ = __rmod__ = _refuse
    __mul__ = __rmul__ = __iter__ = __len__ = __getitem__ = __format__ = _refuse
    __hash__ = object.__hash__


def part_of(annotation: Any, tree: Any, *, wrong: Collection[Path], path: Path = ()) -> Any:
    """`tree` as sections of the given type, unchecked, with Absent at each path in `wrong`."""
    kinds = [kind for kind in members(annotation) if is_section(kind)]
    items = getattr(members(annotation)[0], "__args__", (Any,))[0]
    if isinstance(tree, list) and is_section(items) and path not in wrong:
        return [part_of(items, item, wrong=wrong, path=(*path, i)) for i, item in enumerate(tree)]
    if path in wrong or not isinstance(tree, dict) or not kinds:
        return Absent() if any(bad[: len(path)] == path for bad in wrong) else tree
    kind = kinds[0] if len(kinds) == 1 else next(kind for kind in kinds if tree.get(marker(kind)[0]) == marker(kind)[1])
    made = object.__new__(kind)
    for name, field in fields_of(kind).items():
        if name in tree:
            value = part_of(field.annotation, tree[name], wrong=wrong, path=(*path, name))
            for rewrite in field.metadata if not isinstance(value, Absent) else ():
                value = _rewritten(value, rewrite)
        else:
            value = Absent() if field.is_required() else field.get_default(call_default_factory=True)
        object.__setattr__(made, name, value)
    return made


def _rewritten(value: Any, rewrite: Any) -> Any:
    func: Callable[..., Any] | None = rewrite.func if isinstance(rewrite, BeforeValidator) else None
    return value if func is None else func(value)
