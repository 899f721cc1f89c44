"""The campaigns of `python -m benchmarks.reliability`, each in a short form; docs/reliability.md has the long one's."""

import multiprocessing
from pathlib import Path

import pytest

from benchmarks.reliability.campaign import conduct
from benchmarks.reliability.campaigns import CAMPAIGNS

multiprocessing.set_forkserver_preload(["tests.helpers.warm"])

SHORT = {  # cases, and cases of a pentode that is broken on purpose
    "kills": (2, 1),
    "crash-points": (6, 2),
    "crash-points-strace": (2, 0),
    "power-loss": (300, 0),
    "power-loss-controls": (None, 0),
    "sync-order": (1, 0),
    "damages": (24, 6),
    "io-errors": (8, 2),
    "io-errors-strace": (2, 0),
    "full-disk": (2, 0),
    "preemptions": (4, 3),
}
SLOW = ("crash-points-strace", "io-errors-strace")  # which trace every call of the system
SEED = 1  # another than the long form's


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in SLOW else n for n in SHORT])
def test_a_campaign_ends_as_promised_and_would_notice_if_not(tmp_path: Path, name: str) -> None:
    cases, control = SHORT[name]
    result = conduct(CAMPAIGNS[name], tmp_path / name, cases=cases, control=control, seed=SEED)
    print(result.line())
    if result.left_out:
        pytest.skip(result.left_out)
    assert not result.problems, "\n".join(result.problems)
    assert result.cases >= (cases or 8)
    assert bool(result.control) == bool(control)
