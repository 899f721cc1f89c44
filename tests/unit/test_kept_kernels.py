"""Kernels that packages compile are kept in the user's home, where there is one and nothing else was said."""

import os
from pathlib import Path

import pytest

from pentode.ops.kept_kernels import FLASH, FLASH_IN, FOLDER, QUACK_IN, keep_in_home

SETTINGS = (FLASH, FLASH_IN, QUACK_IN)


@pytest.mark.parametrize("home", ["a folder", "a file", "said otherwise", "said where"])
def test_kernels_are_kept_where_they_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in SETTINGS:
        monkeypatch.setenv(name, "to be undone")
        monkeypatch.delenv(name)
    if home == "a file":
        (tmp_path / "home").touch()
    if home == "said otherwise":
        monkeypatch.setenv(FLASH, "0")
    if home == "said where":
        monkeypatch.setenv(FLASH_IN, "/there")
        monkeypatch.setenv(QUACK_IN, "/there, too")
    keep_in_home()
    folder = tmp_path / "home" / FOLDER
    flash, quack = str(folder / "flash"), str(folder / "quack")
    want = {
        "a folder": ("1", flash, quack),
        "a file": (None, None, None),
        "said otherwise": ("0", None, quack),
        "said where": ("1", "/there", "/there, too"),
    }
    assert tuple(map(os.environ.get, SETTINGS)) == want[home]
    assert folder.is_dir() == (home != "a file")
