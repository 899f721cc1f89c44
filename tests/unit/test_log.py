"""The log: its line format, who prints, what is hidden, and numbers for people."""

import io
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pentode import log

STAMP = r"\d\d/\d\d/\d{4} \d\d:\d\d:\d\d "


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def test_a_line_carries_clock_level_and_place(stream: io.StringIO) -> None:
    log.setup(dp=1, pp=2, tp=3, stream=stream)
    log.info("Start training")
    assert re.fullmatch(STAMP + r"\[INFO\|DP=1\|PP=2\|TP=3\]: Start training\n", stream.getvalue())


def test_every_line_of_a_message_carries_the_prefix(stream: io.StringIO) -> None:
    log.setup(stream=stream)
    log.warning("one\n two\n")
    lines = stream.getvalue().splitlines()
    assert [re.sub(STAMP, "", line) for line in lines] == [
        f"[WARNING|DP=0|PP=0|TP=0]: {s}" for s in ("one", " two", "")
    ]


def test_only_rank_0_speaks_except_for_all_ranks(stream: io.StringIO) -> None:
    log.setup(rank=1, dp=1, stream=stream)
    log.info("quiet")
    log.error("quiet")
    log.once("quiet")
    assert stream.getvalue() == ""
    log.all_ranks("here", level="error")
    assert stream.getvalue().endswith("[ERROR|DP=1|PP=0|TP=0]: here\n")


def test_replicas_have_their_own_level(stream: io.StringIO) -> None:
    log.setup(rank=1, level="debug", replica_level="warning", stream=stream)
    log.all_ranks("too low")
    log.all_ranks("heard", level="warning")
    assert stream.getvalue().count("\n") == 1
    log.setup(rank=0, level="error", replica_level="debug", stream=stream)
    log.warning("too low")
    assert stream.getvalue().count("\n") == 1


def test_once_says_a_thing_once(stream: io.StringIO) -> None:
    log.setup(stream=stream)
    for step in range(3):
        log.once("same")
        log.once(f"step {step}", key="steps")
    assert stream.getvalue().count("same") == 1
    assert stream.getvalue().count("step ") == 1


def test_colour_is_for_terminals_only(stream: io.StringIO) -> None:
    log.setup(stream=stream)
    log.warning("plain")
    assert "\x1b" not in stream.getvalue()
    terminal = Terminal()
    log.setup(stream=terminal)
    log.warning("bright")
    assert terminal.getvalue().startswith("\x1b[1;33m")
    assert terminal.getvalue().endswith("\x1b[0m: bright\n")


@given(st.text())
def test_no_message_can_steer_a_terminal(text: str) -> None:
    stream = io.StringIO()
    log.setup(stream=stream)
    log.info(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", stream.getvalue())
    assert all(re.match(STAMP, line) for line in stream.getvalue().split("\n")[:-1])


def test_values_of_secret_variables_are_masked(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("WANDB_API_KEY", "hf_canary_longer")
    monkeypatch.setenv("db_password", "canary2")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    log.setup(stream=stream)
    log.info("a hf_canary b hf_canary_longer c canary2 false")
    assert stream.getvalue().endswith(": a *** b *** c *** false\n")


def test_a_variable_that_is_set_later_is_masked_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now)
    monkeypatch.setattr(log, "SECRETS", log._Secrets())
    monkeypatch.setenv("FIRST_TOKEN", "canary1")
    assert log.mask("canary1 canary2 canary3") == "*** canary2 canary3"
    monkeypatch.setenv("SECOND_TOKEN", "canary2")  # one more: seen at once
    assert log.mask("canary1 canary2 canary3") == "*** *** canary3"
    monkeypatch.setenv("FIRST_TOKEN", "canary3")  # as many as before: seen a second later
    now += 1.01
    assert log.mask("canary1 canary2 canary3") == "canary1 *** ***"
    monkeypatch.delenv("SECOND_TOKEN")
    assert log.mask("canary1 canary2 canary3") == "canary1 canary2 ***"


def test_variables_are_not_looked_up_for_each_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = 1000.0, []

    class Environment(dict):
        def items(self) -> object:
            looks.append(now)
            return super().items()

    monkeypatch.setattr(log.time, "monotonic", lambda: now)
    monkeypatch.setattr(log.os, "environ", Environment(A_TOKEN="canary"))
    monkeypatch.setattr(log, "SECRETS", log._Secrets())
    for now in (1000.0, 1000.5, 1000.99, 1001.1, 1001.5):  # noqa: B007
        assert log.mask("canary") == "***"
    assert looks == [1000.0, 1001.1]


def test_logins_and_signatures_in_urls_are_masked() -> None:
    url = "s3://me:canary@host/a?X-Amz-Signature=canary&part=2 https://h/a@b"
    assert log.mask(url) == "s3://***@host/a?X-Amz-Signature=***&part=2 https://h/a@b"


def test_a_printer_takes_the_lines_over_and_gives_them_back(stream: io.StringIO) -> None:
    taken: list[str] = []
    log.setup(stream=stream)
    log.print_through(taken.append)
    log.info("one\ntwo")
    log.print_through(None)
    log.info("three")
    assert len(taken) == 1
    assert taken[0].count("DP=0") == 2
    assert stream.getvalue().count("\n") == 1


def test_a_narrow_encoding_loses_no_line() -> None:
    raw = io.BytesIO()
    log.setup(stream=io.TextIOWrapper(raw, encoding="ascii"))
    log.info("caf\xe9")
    assert raw.getvalue().endswith(b": caf\\xe9\n")


def test_log_imports_no_torch() -> None:
    code = "import sys; from pentode import log; log.info('x'); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (512, "512"),
        (1024, "1.02K"),
        (4710.0, "4.71K"),
        (10.0, "10"),
        (0.000296, "0.000296"),
        (1e-05, "1e-05"),
        (67.4e6, "67.4M"),
        (952e9, "952G"),
        (2.13e12, "2.13T"),
        (999.6, "1K"),
        (0, "0"),
        (-1500, "-1.5K"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_read_as_nanotrons(number: float, text: str) -> None:
    assert log.human(number) == text


@given(st.floats(min_value=-9.9e20, max_value=9.9e20))
def test_human_keeps_three_digits(x: float) -> None:
    text = log.human(x)
    power = "KMGTPE".find(text[-1]) + 1
    back = float(text[:-1] if power else text) * 1000**power
    assert back == pytest.approx(x, rel=5.1e-3, abs=0)
    assert power == 0 or 1 <= abs(float(text[:-1])) < 1000
