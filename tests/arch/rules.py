"""The house rules, each a function from one file to its offences: `path:line: what is; what to do`."""

import ast
import re
from collections.abc import Callable, Iterator

from tests.helpers.source import PACKAGE, Source

Rule = Callable[[Source], Iterator[str]]

LAYERS = (  # from the top; a module imports only from lines below its own, never from its own line
    "__main__",
    "cli nano",
    "train generate convert plan launch report",
    "run",
    "models optim data checkpoint metrics",
    "nn",
    "parallel",
    "dist ops",
    "config device log",
    "errors garbage version",
)
HEIGHT = {room: -line for line, rooms in enumerate(LAYERS) for room in rooms.split()}
NO_PLACE = "has no place in the house; add it to a line of LAYERS in tests/arch/rules.py"

FILE_LINES = 400
FUNCTION_LINES = 80

SAYS_CUDA = ("pentode/device.py", "pentode/config/schema.py", "pentode/config/legacy.py")
CUDA_FIELDS = ("cuda_memory_allocated", "cuda_max_memory_reserved", "cuda_graph")  # of Nanotron's log; of the config

COMMUNICATES = ("pentode/dist/collectives.py", "pentode/dist/p2p.py")
COMMUNICATION = re.compile(
    r"^torch\.(ops\._?c10d|distributed\._functional_collectives|distributed\.nn\b"
    r"|distributed\.(\w+\.)*_?(all_reduce|all_gather|all_to_all|reduce|reduce_scatter|broadcast|scatter|gather|barrier"
    r"|monitored_barrier|send|recv|isend|irecv|batch_isend_irecv|P2POp)(_\w+)?$)"
)

RUNS_CODE = re.compile(
    r"^(eval|exec|compile|__import__|torch\.(load|save)|numpy\.load_pickle|pandas\.read_pickle"
    r"|((c?pickle|_pickle|dill|cloudpickle|joblib|marshal|shelve)(\..*)?)|yaml\.(load|unsafe_load|full_load).*)$"
)
REFUSED_IMPORTS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}

HOMELESS = {"utils", "util", "helpers", "helper", "common", "misc", "base", "_base", "impl"}
MARKER = re.compile(r"\b(TODO(?!\(#\d+\): )|FIXME|XXX|HACK)\b")
BANNER = re.compile(r"#\s*[#=*~_-]{4,}")
LICENCE = re.compile(r"\b(Copyright|SPDX|Licensed under)\b", re.IGNORECASE)
SILENT = {"a", "an", "the", "of", "to", "and", "this", "its", "return", "returns", "get", "gets", "given", "for"}
BOTH_WAYS = tuple(
    f"pentode/{name}.py"
    for name in (
        "parallel/tensor",
        "parallel/tensor_overlap",
        "parallel/loss",
        "parallel/recompute",
        "dist/collectives",
    )
)


def imports_go_down(source: Source) -> Iterator[str]:
    """A module imports only from lower lines of the table; imports in functions and under TYPE_CHECKING count."""
    if not source.room:
        return
    if source.room not in HEIGHT:
        yield f"{source.path}: {source.room} {NO_PLACE}"
        return
    for name, line in source.imports:
        if not name.startswith(f"{PACKAGE}."):
            continue
        there = name.split(".")[1]
        if there not in HEIGHT:
            yield f"{source.at(line)}: {there} {NO_PLACE}"
        elif there != source.room and HEIGHT[there] >= HEIGHT[source.room]:
            yield (
                f"{source.at(line)}: {source.room} imports {there}, which does not stand below it; move what both need "
                "into a lower room, or pass it in as an argument"
            )


def imports_are_statements(source: Source) -> Iterator[str]:
    """An import by name would hide who imports whom; so would a relative one."""
    for name, line in source.names:
        if name in {"importlib.import_module", "__import__"}:
            yield f"{source.at(line)}: {name} hides who imports whom; write an import statement"
    for node in source.nodes:
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{source.at(node.lineno)}: a relative import; write `from {PACKAGE}.room.file import name`"


def config_knows_no_torch(source: Source) -> Iterator[str]:
    """`check`, `plan`, `--help` and completion run on a login node, without torch."""
    if source.room in {"config", "log", "errors", "version"}:
        for name, line in source.imports:
            if name.split(".")[0] == "torch":
                yield f"{source.at(line)}: {source.room} imports torch; what needs torch goes to a higher room"


def package_files_are_empty(source: Source) -> Iterator[str]:
    """`__init__.py` files hold nothing: a name has one home."""
    if source.path.endswith("/__init__.py") and source.text.strip():
        yield f"{source.path}: not empty; move what it holds into a file named for it"


def files_are_named_for_what_they_hold(source: Source) -> Iterator[str]:
    """No utils.py: if a function has no home, the house lacks a room."""
    stem = source.path.rsplit("/", 1)[-1].removesuffix(".py")
    if stem in HOMELESS:
        yield f"{source.path}: '{stem}' says nothing; name the file for what it holds"


def files_are_short(source: Source) -> Iterator[str]:
    """A file has at most 400 lines."""
    lines = source.text.count("\n")
    if lines > FILE_LINES:
        yield f"{source.path}: {lines} lines, at most {FILE_LINES}; move one of the things it holds into its own file"


def functions_are_short(source: Source) -> Iterator[str]:
    """A function has at most 80 lines."""
    for node in source.functions():
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > FUNCTION_LINES:
            yield (
                f"{source.at(node.lineno)}: {node.name} has {lines} lines, at most {FUNCTION_LINES}; "
                "give a part of it a name of its own"
            )


def only_device_says_cuda(source: Source) -> Iterator[str]:
    """Devices are pentode/device.py's business."""
    if source.path in SAYS_CUDA:
        return
    remedy = "ask pentode/device.py"
    for node in source.nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            for field in CUDA_FIELDS:
                text = text.replace(field, "")
            if "cuda" in text:
                yield f'{source.at(node.lineno)}: a string that says "cuda"; {remedy}'
        elif isinstance(node, ast.Attribute) and node.attr == "cuda":
            yield f"{source.at(node.lineno)}: .cuda; {remedy}"
    for name, line in source.imports:
        if name.startswith("torch.cuda"):
            yield f"{source.at(line)}: imports torch.cuda; {remedy}"


def only_collectives_communicate(source: Source) -> Iterator[str]:
    """Who sends what to whom is read in two files."""
    if source.path in COMMUNICATES:
        return
    for name, line in [*source.names, *source.imports]:
        if COMMUNICATION.match(name):
            yield f"{source.at(line)}: {name}; only pentode/dist/collectives.py and p2p.py communicate: call them"


def nothing_read_is_run(source: Source) -> Iterator[str]:
    """No pickle and its kin, no eval: files are data."""
    remedy = "files are data: safetensors for tensors, JSON for the rest"
    for name, line in source.names:
        if RUNS_CODE.match(name):
            yield f"{source.at(line)}: {name}; {remedy}"
    for name, line in source.imports:
        if name.split(".")[0] in REFUSED_IMPORTS:
            yield f"{source.at(line)}: imports {name}; {remedy}"
    for node in source.nodes:
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield f"{source.at(node.value.lineno)}: allow_pickle; {remedy}"


def no_global_is_assigned(source: Source) -> Iterator[str]:
    """State is passed in; the only globals are constants and loggers."""
    for node in source.nodes:
        if isinstance(node, ast.Global):
            yield f"{source.at(node.lineno)}: global {', '.join(node.names)}; pass it in, or keep it in an object"


def comments_say_why(source: Source) -> Iterator[str]:
    """No marker without an issue, no banner, no licence header."""
    for text, line in source.comments:
        if MARKER.search(text):
            yield f"{source.at(line)}: finish it, or write `TODO(#123): ...` with an issue's number"
        if BANNER.match(text):
            yield f"{source.at(line)}: a banner; what it separates wants a file or a function of its own"
        if LICENCE.search(text):
            yield f"{source.at(line)}: a licence header; LICENSE covers all files"


def code_is_ascii(source: Source) -> Iterator[str]:
    """Code is ASCII; other characters are written as escapes."""
    for number, line in enumerate(source.text.splitlines(), 1):
        if not line.isascii():
            odd = next(character for character in line if not character.isascii())
            yield f"{source.at(number)}: {odd!r}; write {odd!a} in a string, or an ASCII word"


def public_things_are_described(source: Source) -> Iterator[str]:
    """Each file says what it holds, each public function and class what it does, in more words than its signature."""
    if source.text.strip() and not ast.get_docstring(source.tree):
        yield f"{source.at(1)}: no docstring; say in one line what this file holds"
    for node in source.public():
        text = ast.get_docstring(node)
        if not text:
            yield f"{source.at(node.lineno)}: {node.name} has no docstring; say in one sentence what it is for"
        elif (
            not _words(text)
            - _words(ast.unparse(node.args) if not isinstance(node, ast.ClassDef) else "")
            - _words(node.name)
        ):
            yield f"{source.at(node.lineno)}: {node.name}'s docstring repeats its signature; say what that does not"


def signatures_are_typed(source: Source) -> Iterator[str]:
    """Types on every argument and result."""
    methods = {id(f) for node in source.nodes if isinstance(node, ast.ClassDef) for f in node.body}
    for node in source.functions():
        a = node.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
        if id(node) in methods and not static:
            arguments = arguments[1:]
        bare = [argument.arg for argument in arguments if argument.annotation is None]
        if bare or node.returns is None:
            missing = ", ".join([*bare, *(["the result"] if node.returns is None else [])])
            yield f"{source.at(node.lineno)}: {node.name} has no type for {missing}"


def parallel_code_has_no_any(source: Source) -> Iterator[str]:
    """In `parallel` and `dist`, a type says which."""
    if source.room in {"parallel", "dist"}:
        for name, line in source.names:
            if name == "typing.Any":
                yield f"{source.at(line)}: Any; name the type"


def parallel_primitives_say_both_ways(source: Source) -> Iterator[str]:
    """Each layer, and each function of tensors but in-place ones (name_), says what moves forward and backward."""
    if source.path not in BOTH_WAYS:
        return
    for node in source.public():
        if isinstance(node, ast.ClassDef):
            moves = any(isinstance(part, ast.FunctionDef) and part.name == "forward" for part in node.body)
        else:
            moves = "Tensor" in ast.unparse(node.args) and not node.name.endswith("_")
        text = ast.get_docstring(node) or ""
        missing = [word for word in ("forward", "backward") if not re.search(rf"\b{word}\b", text)]
        if moves and missing:
            yield (
                f"{source.at(node.lineno)}: {node.name}'s docstring lacks {' and '.join(missing)}; say what moves "
                "each way, on which axis"
            )


def _words(text: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall(r"[a-z]+", text.lower())} - SILENT


LIBRARY: tuple[Rule, ...] = (
    imports_go_down,
    imports_are_statements,
    config_knows_no_torch,
    package_files_are_empty,
    files_are_named_for_what_they_hold,
    only_device_says_cuda,
    only_collectives_communicate,
    nothing_read_is_run,
    no_global_is_assigned,
    public_things_are_described,
    parallel_code_has_no_any,
    parallel_primitives_say_both_ways,
)
EVERYWHERE: tuple[Rule, ...] = (
    files_are_short,
    functions_are_short,
    comments_say_why,
    code_is_ascii,
    signatures_are_typed,
)
