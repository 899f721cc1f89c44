"""The commands' process ends with their code, and with nothing left that could abort it."""

import weakref

import pytest

from pentode import cli


class Group:
    """What stands in a cycle with itself, as a process group does with the error of a rank."""

    def __init__(self) -> None:
        self.own = self


def test_what_stands_in_a_cycle_is_gone_when_the_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[weakref.ref[Group]] = []

    def run_command(arguments: list[str]) -> int:
        left.append(weakref.ref(Group()))
        return len(arguments)

    monkeypatch.setattr(cli, "run_command", run_command)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "FILE"])
    assert caught.value.code == 2
    assert [one() for one in left] == [None]
