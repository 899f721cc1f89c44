"""The mutants that live, and why each is harmless; docs: the head of mutants.py."""

import re
from collections.abc import Iterable

# Mutants' keys, without lines; `*` stands for any text. Each reason holds for all mutants that its pattern names.
SURVIVORS: dict[str, str] = {}


def reason_for(key: str) -> str | None:
    """Why this mutant is known to be harmless; None if it is not."""
    return next((reason for pattern, reason in SURVIVORS.items() if _names(pattern, key)), None)


def unneeded(*, tried: Iterable[str], living: Iterable[str], whole: bool) -> list[str]:
    """Entries of the table of which no mutant lives; those that name none of the tried ones, if all were tried."""
    tried, living = list(tried), list(living)
    return [
        pattern
        for pattern in SURVIVORS
        if not any(_names(pattern, key) for key in living) and (whole or any(_names(pattern, key) for key in tried))
    ]


def _names(pattern: str, key: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), key, re.DOTALL) is not None
