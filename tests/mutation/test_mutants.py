"""No message or divisor can be written wrongly without a layout that trains other numbers, or a test that fails."""

import ast
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.source import ROOT
from tests.mutation import survivors
from tests.mutation.by_tests import everything
from tests.mutation.files import BY_TESTS, EXCUSED, FILES
from tests.mutation.mutants import Mutant

SURE = {"_slice_loss", "train_step", "world_sums"}  # functions whose sums and divisors the two smallest layouts need
MISSING = {"left out", "not divided"}


@pytest.fixture(scope="module")
def mutants() -> list[Mutant]:
    return [mutant for mutant, _ in everything(ROOT / "pentode")]


def campaign(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.mutation.campaign", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_file_that_is_named_has_mutants_or_nothing_to_mutate(mutants: list[Mutant]) -> None:
    found = Counter(mutant.path.removeprefix("pentode/") for mutant in mutants)
    assert set(FILES) - set(found) == {"nn/dropout.py", "parallel/recompute.py"}
    assert {trial.file for trial in BY_TESTS} <= set(found)


def test_every_file_that_calls_a_collective_is_tried_or_excused() -> None:
    called = {file: places for file, places in collectives_called().items() if places}
    tried = [(file, functions) for file, functions in FILES.items()] + [(one.file, one.functions) for one in BY_TESTS]
    for file, functions in tried:
        if file in called:
            called[file] -= called[file] if functions is None else set(functions)
    assert {file for file, places in called.items() if places} == set(EXCUSED), called


def collectives_called() -> dict[str, set[str]]:
    """The functions of each file of the package that name a function of `pentode.dist.collectives`."""
    package, module = ROOT / "pentode", "pentode.dist.collectives"
    tree = ast.parse((package / "dist" / "collectives.py").read_text(encoding="utf-8"))
    public = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}
    assert {"all_reduce", "gather_objects", "wait_for_all"} <= public

    def named(node: ast.AST, where: str, names: dict[str, str]) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            where = f"{where}.{node.name}".lstrip(".")
        if isinstance(node, ast.Name | ast.Attribute):
            start, _, rest = ast.unparse(node).partition(".")
            full = f"{names.get(start, '')}.{rest}".rstrip(".")
            if full.rpartition(".")[0] == module and full.rpartition(".")[2] in public:
                yield where
        for child in ast.iter_child_nodes(node):
            yield from named(child, where, names)

    found = {}
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names = {one.asname or one.name: f"{node.module}.{one.name}" for node in imports for one in node.names}
        found[path.relative_to(package).as_posix()] = set(named(tree, "", names))
    return found


def test_names_are_unique_and_every_mutant_is_python_that_differs(mutants: list[Mutant]) -> None:
    assert len({mutant.key for mutant in mutants}) == len(mutants)
    for mutant in mutants:
        text = (ROOT / mutant.path).read_text(encoding="utf-8")
        ast.parse(mutant.of(text))
        written = ast.parse(f"({text[mutant.start : mutant.stop]})")
        assert ast.dump(ast.parse(mutant.replacement)) != ast.dump(written), mutant.name


def test_the_table_names_mutants_that_there_are(mutants: list[Mutant]) -> None:
    keys = [mutant.key for mutant in mutants]
    assert survivors.unneeded(tried=keys, living=keys, whole=True) == []


def test_a_handful_of_mutants_dies(mutants: list[Mutant], tmp_path: Path) -> None:
    sure = [mutant for mutant in mutants if mutant.where in SURE and mutant.change in MISSING]
    names = [mutant.name for mutant in random.Random(0).sample(sure, 2)]
    only = [option for name in names for option in ("--only", name)]
    done = campaign("--layouts", "2", "--workers", "2", "--out", str(tmp_path), *only)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "2 mutants: differs 2" in done.stdout


@pytest.mark.long
def test_no_mutant_lives_without_a_reason(tmp_path: Path) -> None:
    done = campaign("--workers", str(os.cpu_count()), "--out", str(tmp_path))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
