"""The wheel holds the library and nothing else; pins and extras agree; make builds .venv once."""

import re
import shutil
import subprocess
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest

from pentode.version import VERSION
from tests.helpers.source import ROOT, package

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIN = re.compile(r"^[A-Za-z0-9._-]+==[0-9][0-9a-z.]*$")


def plain(name: str) -> str:
    """A requirement's package, as package indexes compare names."""
    return re.split(r"[\s\[<>=!;]", name)[0].lower().replace("_", "-")


def pins() -> list[str]:
    """The lines of constraints.txt that pin something."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = pytest.importorskip("hatchling.build")
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return folder / build.build_wheel(str(folder))


def test_the_wheel_holds_every_module_and_nothing_but_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"pentode-{VERSION}.dist-info"
    assert {source.path for source in package()} <= names
    assert {name.split("/")[0] for name in names} == {"pentode", info}
    assert f"{info}/licenses/LICENSE" in names


def test_the_wheel_says_its_version_and_its_command(wheel: Path) -> None:
    info = f"pentode-{VERSION}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{info}/METADATA").decode()
        commands = archive.read(f"{info}/entry_points.txt").decode()
    assert f"\nVersion: {VERSION}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "pentode = pentode.cli:main" in commands


def test_all_that_we_ask_for_is_pinned() -> None:
    asked = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    missing = {plain(name) for name in asked} - {plain(pin) for pin in pins()} - {"pentode"}
    assert not missing, f"constraints.txt: no pin for {', '.join(sorted(missing))}; take the version of a fresh install"


def test_each_pin_is_one_exact_version() -> None:
    odd = [line for line in pins() if not PIN.match(line)]
    assert not odd, f"constraints.txt: {odd}; write name==version"
    assert len({plain(line) for line in pins()}) == len(pins()), "constraints.txt: a package is pinned twice"
    assert "torch==2.13.0" in pins()


def test_the_changelog_tells_of_this_version() -> None:
    assert f"\n## {VERSION}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_setup_names_the_remedy_when_python_is_too_old(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "tools"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(["make", "setup", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "is Python 3.9.2; Pentode needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()
