"""Where packages that compile kernels on a machine's first run keep them for later ones: in the user's home."""

import os
from pathlib import Path

FOLDER = Path(".cache", "pentode")  # in the user's home
FLASH, FLASH_IN = (
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR",
)  # flash-attn-4 keeps none
QUACK_IN = "QUACK_CACHE_DIR"  # quack-kernels keeps them in a folder for temporary files


def keep_in_home() -> None:
    """Say so to the packages, which read it when they are imported; not where the user has said, or has no home."""
    try:
        home = Path.home() / FOLDER
        home.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return
    if FLASH not in os.environ:
        os.environ[FLASH] = "1"
        os.environ.setdefault(FLASH_IN, str(home / "flash"))
    os.environ.setdefault(QUACK_IN, str(home / "quack"))
