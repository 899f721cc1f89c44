"""The repository's Python files as the house rules read them: text and syntax tree, nothing imported."""

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "pentode"
FOLDERS = (PACKAGE, "tests", "examples", "benchmarks")  # with the scripts at the root, all the Python there is


@dataclass(frozen=True)
class Source:
    """One file: its path from the root, as `pentode/train/step.py`, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text, self.path)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """Every node of the tree."""
        return list(ast.walk(self.tree))

    @property
    def module(self) -> str:
        """The dotted name, as `pentode.train.step`."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def room(self) -> str:
        """The part of the house it stands in, as `train`; empty for the package itself."""
        return self.module.removeprefix(PACKAGE).removeprefix(".").split(".")[0]

    def at(self, line: int) -> str:
        """`path:line`, which editors open."""
        return f"{self.path}:{line}"

    @cached_property
    def imports(self) -> list[tuple[str, int]]:
        """What it imports, wherever the statement stands, as full names with lines.

        `from a import b` gives `a.b`: b may be a module.
        """
        found: list[tuple[str, int]] = []
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found += [(alias.name, node.lineno) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = self._package(node.level)
                start = ".".join(part for part in (package, node.module) if part)
                found += [(f"{start}.{alias.name}", node.lineno) for alias in node.names]
        return found

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Each imported name, as the file says it, and what it stands for: {"dist": "torch.distributed"}."""
        found: dict[str, str] = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom):
                found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        return found

    @cached_property
    def names(self) -> list[tuple[str, int]]:
        """Every name and dotted name that it uses, aliases undone: `dist.barrier` gives `torch.distributed.barrier`."""
        inner = {id(node.value) for node in self.nodes if isinstance(node, ast.Attribute)}
        found: list[tuple[str, int]] = []
        for node in self.nodes:
            if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner and isinstance(node.ctx, ast.Load):
                name = self._dotted(node)
                found += [(name, node.lineno)] if name else []
        return found

    @cached_property
    def comments(self) -> list[tuple[str, int]]:
        """The comments, from their hash sign on, with lines."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return [(token.string, token.start[0]) for token in tokens if token.type == tokenize.COMMENT]

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function and method, inner ones too."""
        return (node for node in self.nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    def public(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
        """The functions and classes that others may import."""
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith(
                "_"
            ):
                yield node

    def _package(self, level: int) -> str:
        """What `level` leading dots mean in a relative import here."""
        if not level:
            return ""
        parts = self.path.removesuffix(".py").split("/")
        return ".".join(parts[: len(parts) - level])

    def _dotted(self, node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            start = self._dotted(node.value)
            return f"{start}.{node.attr}" if start else f"?.{node.attr}"
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, node.id)
        return ""


@cache
def read(path: Path) -> Source:
    """The file at `path`, read and parsed once."""
    return Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


def package() -> list[Source]:
    """The library's files."""
    return [read(path) for path in sorted((ROOT / PACKAGE).rglob("*.py"))]


def everything() -> list[Source]:
    """All Python files of the repository: library, tests, examples, benchmarks and the scripts at the root."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return [read(path) for path in sorted(paths)]
