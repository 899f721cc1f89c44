"""What starts without torch, and how much of the processor's time it takes."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pentode.version import VERSION
from tests.helpers.source import ROOT

HELP_SECONDS = 0.3
CHECK_SECONDS = 1.0
TORCH = re.compile(r"\| +torch$", re.MULTILINE)  # a line of `python -X importtime`

COMMANDS = {
    "help": (["--help"], HELP_SECONDS),
    "help of train": (["train", "--help"], CHECK_SECONDS),
    "schema": (["schema"], CHECK_SECONDS),
    "check": (["check", "examples/char_gpt.yaml"], CHECK_SECONDS),
    "plan": (["plan", "--schedule", "examples/config_tiny_llama.yaml", "parallelism.pp=2"], CHECK_SECONDS),
}


def run(*arguments: str, compiled: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in the repository's root; `compiled` keeps the bytecode, as an installation does."""
    environment = dict(os.environ)
    if compiled is not None:
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment["PYTHONPYCACHEPREFIX"] = str(compiled)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def processor_seconds(*arguments: str, compiled: Path) -> float:
    """User time of one such process: what else the machine does hardly matters to it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = run(*arguments, compiled=compiled)
    assert done.returncode == 0, done.stderr
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def test_importing_the_package_imports_no_torch() -> None:
    done = run("-X", "importtime", "-c", "import pentode")
    assert done.returncode == 0, done.stderr
    assert not TORCH.search(done.stderr)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_imports_no_torch(command: str) -> None:
    arguments, _ = COMMANDS[command]
    done = run("-X", "importtime", "-m", "pentode", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not TORCH.search(done.stderr), (
        f"pentode {' '.join(arguments)} imports torch; `python -X importtime` says where"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_answers_at_once(command: str, tmp_path: Path) -> None:
    arguments, limit = COMMANDS[command]
    best = min(processor_seconds("-m", "pentode", *arguments, compiled=tmp_path) for _ in range(5))
    assert best < limit, f"pentode {' '.join(arguments)}: {best:.2f} s of user time, at most {limit}"


def test_the_version_is_the_one_of_version_py() -> None:
    assert run("-m", "pentode", "--version").stdout == f"pentode {VERSION}\n"


def test_a_wrong_command_is_told_in_a_line_and_exits_64(tmp_path: Path) -> None:
    done = run("-m", "pentode", "check", str(tmp_path / "none.yaml"))
    assert done.returncode == 64
    assert "none.yaml" in done.stderr
    assert "Traceback" not in done.stderr
