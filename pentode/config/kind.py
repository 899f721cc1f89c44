"""Which kind an open section is: by its tag, by its `type` or `name`, or by the keys that only one kind has."""

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pentode.config.section import fields_of, is_section, marker, members, nullable, required
from pentode.config.tree import Items, Path, Problem, Section

NOT_BUILT = {  # kinds of Nanotron's that a file may name, by tag (is_qwen2_config: true) or type
    "qwen2": "Qwen2 shapes",
    "starcoder2": "Starcoder2 shapes",
    "mamba": "Mamba shapes",
    "llamoe": "mixture-of-experts shapes",
}


def settle(tree: Any, annotation: Any, path: Path = ()) -> Iterator[Problem]:
    """Write into each open section which kind it is, and drop each null that only means the default.

    Yields a problem for each section whose kind is unknown.
    """
    alternatives = members(annotation)
    if isinstance(tree, Items):
        for index, item in enumerate(tree):
            if get_origin(alternatives[0]) is list:
                yield from settle(item, get_args(alternatives[0])[0], (*path, index))
        return
    kinds = [kind for kind in alternatives if is_section(kind)]
    if not isinstance(tree, Section) or not kinds:
        return
    kind = kinds[0]
    if len(kinds) > 1:
        kind = _choose(tree, kinds)
        if isinstance(kind, str):
            yield Problem(path, kind)
            return
        tree[marker(kind)[0]] = marker(kind)[1]
    for name, field in fields_of(kind).items():
        if name not in tree:
            continue
        if tree[name] is None and not field.is_required() and not nullable(field.annotation):
            tree.take(name)
        else:
            yield from settle(tree[name], field.annotation, (*path, name))


def _choose(tree: Section, kinds: list[Any]) -> Any:
    """The kind that `tree` is, or a sentence saying why that is unknown."""
    word = marker(kinds[0])[0]
    names = " or ".join(marker(kind)[1] for kind in kinds)
    for tag in [key for key in tree if key.startswith("is_") and key.endswith("_config")]:
        value, place = tree.take(tag)
        if value:
            tree.put(word, tag.removeprefix("is_").removesuffix("_config"), place)
    if word in tree:
        said = str(tree[word]).lower()
        named = [kind for kind in kinds if marker(kind)[1].lower() == said]
        if named:
            return named[0]
        if said in NOT_BUILT:
            return f"{NOT_BUILT[said]} are not built yet; use {names}"
        return f"{word} {said!r} is unknown; use {names}"

    shared = set.intersection(*(set(fields_of(kind)) for kind in kinds))
    scores = [len((tree.keys() & fields_of(kind).keys()) - shared) for kind in kinds]
    if not any(scores):
        return f"nothing here says which kind this is; write `{word}:` {names}"
    fits = [(score, required(kind) <= tree.keys()) for kind, score in zip(kinds, scores, strict=True)]
    return kinds[fits.index(max(fits))]
