"""The house rules hold: each over the library, some over all Python here. docs: CONTRIBUTING.md."""

import graphlib

import pytest

from tests.arch.rules import EVERYWHERE, LIBRARY, Rule
from tests.helpers.source import PACKAGE, everything, package


@pytest.mark.parametrize("rule", LIBRARY, ids=lambda rule: rule.__name__)
def test_the_library_keeps_the_rule(rule: Rule) -> None:
    offences = [line for source in package() for line in rule(source)]
    assert not offences, f"{rule.__doc__}\n" + "\n".join(offences)


@pytest.mark.parametrize("rule", EVERYWHERE, ids=lambda rule: rule.__name__)
def test_all_code_keeps_the_rule(rule: Rule) -> None:
    offences = [line for source in everything() for line in rule(source)]
    assert not offences, f"{rule.__doc__}\n" + "\n".join(offences)


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {source.module: source for source in package()}
    graph = {}
    for name, source in modules.items():
        found = {target for target, _ in source.imports if target.startswith(f"{PACKAGE}.")}
        graph[name] = {t if t in modules else t.rpartition(".")[0] for t in found} - {name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = " -> ".join(error.args[1])
        pytest.fail(f"these import each other in a circle: {circle}; move what they share into a file below them")
