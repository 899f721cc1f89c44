"""The campaigns of `python -m benchmarks.reliability`, each in a short form; docs/reliability.md has the long one's."""

from pathlib import Path

import pytest

from benchmarks.reliability.campaign import conduct
from benchmarks.reliability.campaigns import CAMPAIGNS

SHORT = {"power-loss": (300, 0), "power-loss-controls": (None, 0), "damages": (40, 8), "io-errors": (10, 3)}
SEED = 1  # another than the long form's


@pytest.mark.parametrize("name", SHORT)
def test_a_campaign_ends_as_promised_and_would_notice_if_not(tmp_path: Path, name: str) -> None:
    cases, control = SHORT[name]
    result = conduct(CAMPAIGNS[name], tmp_path / name, cases=cases, control=control, seed=SEED)
    print(result.line())
    assert not result.problems, "\n".join(result.problems)
    assert result.cases >= (cases or 5)
    assert bool(result.control) == bool(control)
