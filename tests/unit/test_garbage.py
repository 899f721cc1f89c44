"""What runs uncollected leaves the collector as it was, however it ends."""

import gc
from collections.abc import Iterator

import pytest

from pentode import cli
from pentode.garbage import uncollected
from pentode.train.collector import Collector


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


def test_nothing_is_collected_until_its_end() -> None:
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_leaves_it_as_it_was() -> None:
    with pytest.raises(ValueError, match="x"), uncollected():
        raise ValueError("x")
    assert gc.isenabled()


def test_who_had_disabled_it_finds_it_so() -> None:
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()


def test_a_loop_collects() -> None:
    with uncollected():
        with Collector():
            assert gc.isenabled()
        assert not gc.isenabled()


def test_a_run_starts_uncollected(monkeypatch: pytest.MonkeyPatch) -> None:
    collects: list[bool] = []
    monkeypatch.setattr(cli, "_train", lambda *_, **__: collects.append(gc.isenabled()))
    assert cli.run_command(["train", "FILE"]) == 0
    assert collects == [False]
    assert gc.isenabled()
