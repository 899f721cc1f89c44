"""Finds where the parallel code communicates, divides and tells ranks apart, and writes each such place wrongly.

Each place, in one of these ways at a time:

    a message               left out, sent twice, on another axis
    an axis, handed over    left out, another one
    a divisor, a scale      left out, twice as large, another axis's size
    a rank or a size        always the first's, another axis's
    a wait                  left out (and messages made slow, so that it is missed)
    work done together      by each rank for itself

Gathering objects is not doubled: the second list would be equal to the first. Nothing of the package is imported here:
only its text is read.
"""

import ast
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tests.mutation.files import FILES

STAND_INS = "stand_ins"  # the module of this folder that a mutated package gets
SHOWN = 100  # characters of a place's text

OF_GROUPS = {"dist/collectives.py", "dist/p2p.py", "parallel/tensor_overlap.py"}  # where an axis must have a group
OF_NUMBERS = {"parallel/pipeline/schedules.py"}  # where `pp` is a number
OF_PATHS = {"checkpoint", "generate", "train"}  # rooms where `/` joins paths, unless a number stands behind it
OF_PATHS_BUT = {"generate/engine.py", "train/evaluate.py", "train/sanity.py", "train/signals.py", "train/step.py"}

GIVE_TENSORS = set(  # in place of their first argument
    "replicate all_reduce all_gather reduce_scatter gather gather_again sum_and_split all_max sum_ max_ broadcast_ "
    "local_part enter leave local_tokens _reduce _join _sum_and_split _gather_after all_gather_into_tensor "
    "reduce_scatter_tensor _Replicate.apply _AllReduce.apply _AllGather.apply _ReduceScatter.apply".split()
)
GIVE_WORK = set(  # or nothing
    "start_sum_ start_sum_and_split_ start_join_ _reduce_scatter _all_gather dist.all_reduce dist.broadcast "
    "dist.all_gather_object dist.barrier dist.isend dist.irecv send put_signal wait_signal barrier wait_for_all".split()
)
INSTEAD = {  # of those that give something else; {owner} is what the method is of
    "gather_objects": "[{0}]",
    "beside": "{0}",
    "together": "({0})()",
    "together_at_length": "({0})()",
    "in_turn": "({0})()",
    "on_first": "(({0})() if {1}.rank == 0 else None)",
    "on_first_at_length": "(({0})() if {1}.rank == 0 else None)",
    "ring.start": f"{STAND_INS}.stayed({{0}}, {{into}})",
    "receive": f"{STAND_INS}.nothing_of({{0}}, {{owner}}.device)",
    "batch_isend_irecv": "[]",
    "wait_tensor": "{0}",
    "wait": f"{STAND_INS}.unwaited({{owner}})",
    "wait_for": "None",
    "before_use": "None",
    "flush": "None",
}
WAITS = {"wait_tensor", "wait", "wait_for", "before_use", "flush"}
OF_A_PLACE = {"enter", "leave", "local_tokens"}  # what moves along the axis that its place has

AXES = {"axis", "copies", "data", "pp", "shards", "tp", "world"}  # as variables
AXES_WITHIN = {"axis", "copies", "data", "dp", "ends", "model", "pp", "tp", "tp_kv", "world"}  # as attributes of these
WITHIN = {"ctx", "master", "mesh", "place", "ring", "self", "vocab"}
SAY_WHO_HOLDS = {"copies", "sum_over", "shared_with"}  # arguments
DIVISIONS = (ast.Div, ast.FloorDiv, ast.Mod)


@dataclass(frozen=True)
class Mutant:
    """One place written wrongly: characters [start, stop) of the file at `path` replaced.

    slow  messages are to be slow, so that a wait left out is missed
    """

    path: str
    line: int
    where: str
    text: str
    change: str
    start: int
    stop: int
    replacement: str
    slow: bool
    number: int = 1  # among places of one function that read alike

    @property
    def key(self) -> str:
        """What names it whatever happens to other lines of the file."""
        number = f" (no. {self.number})" if self.number > 1 else ""
        return f"{self.path} {self.where}: {self.text}{number}: {self.change}"

    @property
    def name(self) -> str:
        """The key, with its line."""
        return self.key.replace(self.path, f"{self.path}:{self.line}", 1)

    def of(self, text: str) -> str:
        """The file's text with the change, and with the stand-ins at hand."""
        at = _end_of_docstring(text)
        changed = text[: self.start] + self.replacement + text[self.stop :]
        return f"{changed[:at]}from pentode import {STAND_INS}\n{changed[at:]}"


@dataclass(frozen=True)
class _Place:
    node: ast.expr
    where: str
    parents: tuple[ast.AST, ...]


Change = tuple[str, ast.expr | str]


def mutants_of(package: Path, files: Mapping[str, Sequence[str] | None] = FILES) -> list[Mutant]:
    """The mutants of these files of the package that lies in this folder, in the order of its lines."""
    found: list[Mutant] = []
    for name, functions in files.items():
        text = (package / name).read_text(encoding="utf-8")
        starts = _line_starts(text)
        for place in _places(ast.parse(text), functions):
            node = place.node
            start = starts[node.lineno - 1] + node.col_offset
            stop = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
            shown = ast.unparse(node)
            shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
            slow = isinstance(node, ast.Call) and _called(node) in WAITS
            for change, wrong in _changes(place, name):
                written = wrong if isinstance(wrong, str) else ast.unparse(wrong)
                path = f"{package.name}/{name}"
                found.append(Mutant(path, node.lineno, place.where, shown, change, start, stop, f"({written})", slow))
    found.sort(key=lambda mutant: (mutant.path, mutant.start, -mutant.stop))
    alike: Counter[str] = Counter()
    numbered = []
    for mutant in found:
        alike[mutant.key] += 1
        numbered.append(replace(mutant, number=alike[mutant.key]))
    return numbered


def _places(tree: ast.Module, functions: Sequence[str] | None) -> Iterator[_Place]:
    """Every expression that a step computes: not those of errors, assertions, types and compiled forms."""

    def walk(node: ast.AST, where: str, parents: tuple[ast.AST, ...]) -> Iterator[_Place]:
        children: Sequence[ast.AST] = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Constant):
            return
        if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise):
            children = node.orelse
        elif isinstance(node, ast.FunctionDef):
            if node.name == "_":  # what torch.compile is told of an operator; it computes nothing
                return
            where, children = f"{where}.{node.name}".lstrip("."), [*node.args.defaults, *node.body]
        elif isinstance(node, ast.ClassDef):
            where, children = f"{where}.{node.name}".lstrip("."), node.body
        elif isinstance(node, ast.AnnAssign):
            children = [node.value] if node.value else []
        if isinstance(node, ast.expr) and where and (functions is None or where in functions):
            yield _Place(node, where, parents)
        for child in children:
            yield from walk(child, where, (*parents, node))

    return walk(tree, "", ())


def _changes(place: _Place, file: str) -> Iterator[Change]:
    """What can be written in a place's stead."""
    node, other = place.node, "alike" if file in OF_GROUPS else "crossing"
    if isinstance(node, ast.Call):
        yield from _of_call(node)
        if file not in OF_NUMBERS:
            others = ("alike",) if file in OF_GROUPS else ("crossing", "wider")
            yield from _of_arguments(node, others=others, groups=file.split("/")[0] not in OF_PATHS)
    elif isinstance(node, ast.BinOp):
        if not (_joins_paths(node) and file.split("/")[0] in OF_PATHS and file not in OF_PATHS_BUT):
            yield from _of_product(node, other)
    elif isinstance(node, ast.Compare) and _asks_who_counts(node):
        yield "on every rank", ast.Constant(isinstance(node.ops[0], ast.Eq))
        yield "another axis's rank", _of_other_axes(node, other)
    elif isinstance(node, ast.BoolOp) and _says_who_counts(node):
        for kept, dropped in (node.values, node.values[::-1]):
            if not isinstance(dropped, ast.Compare):
                yield f"without {ast.unparse(dropped)}", kept
    elif isinstance(node, ast.IfExp) and _is_axis(node.body):
        yield "left out", node.orelse
        yield (
            f"another axis than {ast.unparse(node.body)}",
            ast.IfExp(node.test, _stand_in(other, node.body), node.orelse),
        )
    elif isinstance(node, ast.Attribute) and _is_share(node) and not _seen_from_above(place):
        yield "always the first's", ast.Constant(0 if node.attr == "rank" else 1)
        yield "another axis's", _of_other_axes(node, other)


def _of_call(node: ast.Call) -> Iterator[Change]:
    name, function = _called(node), ast.unparse(node.func)
    first = node.args[0] if node.args else None
    owner = node.func.value if isinstance(node.func, ast.Attribute) else None
    if function in GIVE_WORK or name in GIVE_WORK or function == "start":
        yield "left out", ast.Constant(None)
        yield "twice", _twice(node)
    elif first is not None and (function in GIVE_TENSORS or name in GIVE_TENSORS) and function != "logits.gather":
        yield "left out", first
        yield "twice", ast.Call(node.func, [node, *node.args[1:]], node.keywords)
    elif function in INSTEAD or name in INSTEAD:
        fields = {str(k.arg): ast.unparse(k.value) for k in node.keywords} | {"owner": ast.unparse(owner or node.func)}
        instead = INSTEAD.get(function) or INSTEAD[name]
        yield "left out", instead.format(*map(ast.unparse, node.args), **fields)
        if function == "ring.start" or name == "receive":
            yield "twice", _twice(node)
    elif name == "clamp" and owner is not None:
        yield "left out", owner
        bounds = [ast.keyword(k.arg, ast.BinOp(ast.Constant(2), ast.Mult(), k.value)) for k in node.keywords]
        yield "twice as far", ast.Call(node.func, node.args, bounds)
    elif name == "replicated" and owner is not None:
        yield "as if it were cut", ast.Call(ast.Attribute(owner, "parameter", ast.Load()), node.args, node.keywords)
    if name in OF_A_PLACE and owner is not None:
        elsewhere = ast.Attribute(_stand_in("elsewhere", owner), name, ast.Load())
        yield f"another axis than {ast.unparse(owner)}.tp", ast.Call(elsewhere, node.args, node.keywords)


def _of_arguments(node: ast.Call, *, others: Sequence[str], groups: bool) -> Iterator[Change]:
    """The axes and groups that a call is given: others, or none. A checkpoint's `groups` are none of ranks."""
    if _called(node) in ("_name", "_address", "Axis"):
        return
    for keyword in node.keywords:
        if keyword.arg in SAY_WHO_HOLDS and isinstance(keyword.value, ast.Attribute | ast.Tuple):
            empty = ast.Tuple([], ast.Load()) if isinstance(keyword.value, ast.Tuple) else ast.Constant(None)
            changed = [ast.keyword(k.arg, empty if k is keyword else k.value) for k in node.keywords]
            yield f"without {keyword.arg}", ast.Call(node.func, node.args, changed)
    if _called(node) == "Cut" and len(node.args) > 3:
        yield "without copies", ast.Call(node.func, node.args[:3], node.keywords)
    given = [argument.value if isinstance(argument, ast.Starred) else argument for argument in node.args]
    given += [keyword.value for keyword in node.keywords]
    found = [(ast.unparse(axis), argument) for argument in given if (axis := _axis_in(argument)) is not None]
    for axis in dict.fromkeys(name for name, _ in found):
        only_size = all(ast.unparse(argument) == f"{axis}.size" for name, argument in found if name == axis)
        for other in ["crossing" if other == "alike" and only_size else other for other in others]:
            how = f"wider than {axis}" if other == "wider" else f"another axis than {axis}"
            yield how, _with_other(node, axis, other)
    of_an_axis = groups and _called(node) not in ("group_of", "irecv")  # a channel's group is of none
    if of_an_axis and any(ast.unparse(argument) in ("group", "ctx.group") for argument in given):

        def elsewhere(part: ast.AST) -> ast.expr | None:
            is_group = isinstance(part, ast.Name | ast.Attribute) and ast.unparse(part) in ("group", "ctx.group")
            return _stand_in("other_group", part) if is_group else None

        yield "another axis", _changed(node, elsewhere)


def _of_product(node: ast.BinOp, other: str) -> Iterator[Change]:
    if isinstance(node.op, DIVISIONS):
        yield "not divided", node.left
        yield (
            "divided by twice as much",
            ast.BinOp(node.left, node.op, ast.BinOp(ast.Constant(2), ast.Mult(), node.right)),
        )
        if any(_is_share(part) for part in ast.walk(node)):
            yield "another axis's", _of_other_axes(node, other)
    elif isinstance(node.op, ast.Mult) and ast.unparse(node.right) in ("scale", "self.scale", "grad"):
        yield "not scaled", node.left
        yield "scaled twice", ast.BinOp(node, ast.Mult(), node.right)


def _joins_paths(node: ast.BinOp) -> bool:
    number = isinstance(node.right, ast.Constant) and isinstance(node.right.value, int | float)
    return isinstance(node.op, ast.Div) and not number


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _is_axis(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in AXES
    if isinstance(node, ast.Call):
        return _called(node) == "everyone"
    if not isinstance(node, ast.Attribute) or node.attr not in AXES_WITHIN:
        return False
    return (node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")) in WITHIN


def _is_share(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in ("rank", "size") and _is_axis(node.value)


def _axis_in(argument: ast.expr) -> ast.expr | None:
    """The axis that an argument is, or is the size, the group, the name or the address of."""
    if isinstance(argument, ast.Call) and _called(argument) in ("_name", "_address"):
        argument = argument.args[0]
    elif isinstance(argument, ast.Attribute) and argument.attr in ("size", "group"):
        argument = argument.value
    return argument if _is_axis(argument) and ast.unparse(argument) not in ("copies", "shards") else None


def _asks_who_counts(node: ast.Compare) -> bool:
    left, right = node.left, node.comparators[0]
    return _is_share(left) and ast.unparse(left).endswith(".rank") and isinstance(right, ast.Constant)


def _says_who_counts(node: ast.BoolOp) -> bool:
    compared = any(isinstance(value, ast.Compare) and _asks_who_counts(value) for value in node.values)
    return len(node.values) == 2 and isinstance(node.op, ast.Or) and (compared or "self.sum_over" in ast.unparse(node))


def _seen_from_above(place: _Place) -> bool:
    """Whether a rank or a size is a part of a place that is changed as a whole."""
    above = place.parents[-1]
    return (
        isinstance(above, ast.Compare)
        or (isinstance(above, ast.Call | ast.keyword) and ast.unparse(place.node).endswith(".size"))
        or any(isinstance(parent, ast.BinOp) and isinstance(parent.op, DIVISIONS) for parent in place.parents)
    )


def _stand_in(name: str, argument: ast.expr) -> ast.expr:
    return ast.Call(ast.Attribute(ast.Name(STAND_INS, ast.Load()), name, ast.Load()), [argument], [])


def _twice(node: ast.Call) -> ast.expr:
    twice = ast.Attribute(ast.Name(STAND_INS, ast.Load()), "twice", ast.Load())
    return ast.Call(twice, [node.func, *node.args], node.keywords)


def _of_other_axes(node: ast.expr, other: str) -> ast.expr:
    """The same with another axis's ranks and sizes; a size alone is not taken from one that is alike."""
    if all(part.attr == "size" for part in ast.walk(node) if isinstance(part, ast.Attribute) and _is_share(part)):
        other = "crossing"

    def change(part: ast.AST) -> ast.expr | None:
        if isinstance(part, ast.Attribute) and _is_share(part):
            return ast.Attribute(_stand_in(other, part.value), part.attr, part.ctx)
        return None

    return _changed(node, change)


def _with_other(node: ast.Call, axis: str, other: str) -> ast.expr:
    """The call with another axis than this one, wherever its arguments are of that."""

    def change(part: ast.AST) -> ast.expr | None:
        return _stand_in(other, part) if isinstance(part, ast.expr) and ast.unparse(part) == axis else None

    def changed(argument: ast.expr) -> ast.expr:
        found = _axis_in(argument.value if isinstance(argument, ast.Starred) else argument)
        return argument if found is None or ast.unparse(found) != axis else _changed(argument, change)

    keywords = [ast.keyword(k.arg, changed(k.value)) for k in node.keywords]
    return ast.Call(node.func, [changed(argument) for argument in node.args], keywords)


def _changed(node: ast.expr, change: Callable[[ast.AST], ast.expr | None]) -> ast.expr:
    """The tree with what `change` gives in place of the nodes for which it gives something."""

    class Changer(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return change(node) or super().generic_visit(node)

    return Changer().visit(deepcopy(node))


@cache
def _end_of_docstring(text: str) -> int:
    first = next(node for node in ast.parse(text).body if not isinstance(node, ast.Expr))
    return _line_starts(text)[first.lineno - 1]


def _line_starts(text: str) -> list[int]:
    """Where each line begins; code is ASCII, so that columns count characters."""
    found = [0]
    for line in text.splitlines(keepends=True):
        found.append(found[-1] + len(line))
    return found
