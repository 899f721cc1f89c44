"""The log: one line format that knows the rank's coordinates, safe to print anything through, and no torch.

A line reads `08/31/2024 14:37:22 [INFO|DP=0|PP=0|TP=0]: message`, as Nanotron's did, and every line of a message has
the prefix. Control characters are escaped and credentials masked, so that a file name or a token from somewhere else
can neither repaint a terminal nor leak.
"""

import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TextIO

LOGGER = logging.getLogger("pentode")

SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
SECRET_LENGTH = 6  # shorter values ("1", "false" of TOKENIZERS_PARALLELISM) would blank out ordinary words
URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
URL_SIGNATURE = re.compile(r"(?<=[?&])(X-Amz-[\w-]+|AWSAccessKeyId|Signature|sig|token)=[^&\s\"']+", re.IGNORECASE)

BIDIRECTIONAL = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # these reorder what a reader sees
CONTROL = {c: f"\\x{c:02x}" for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\t\n"}
ESCAPES = CONTROL | {c: f"\\u{c:04x}" for c in BIDIRECTIONAL}

COLOURS = {logging.DEBUG: "\x1b[32m", logging.INFO: "\x1b[2m", logging.WARNING: "\x1b[1;33m"}
ERROR_COLOUR = "\x1b[1;31m"
RESET = "\x1b[0m"
SIZES = ("", "K", "M", "G", "T", "P", "E")


class RankHandler(logging.Handler):
    """Prints records with the rank's coordinates on every line."""

    def __init__(self, *, place: str, rank: int, stream: TextIO | None) -> None:
        super().__init__()
        self.place = place
        self.rank = rank
        self.stream = stream
        self.printer: Callable[[str], None] | None = None  # the live progress display, while there is one
        self.said: set[str] = set()
        self.silent = False
        self.file: TextIO | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.silent:
            return
        stream = self.stream or sys.stdout  # looked up now: whoever swaps sys.stdout gets the lines
        text = self.lines(record, colour=stream.isatty())
        if self.printer is not None:
            return self.printer(text)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        try:
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
            stream.flush()
        except OSError:
            self.silent = True  # a full disk, or a reader that has seen enough: neither may end a run

    def close(self) -> None:
        """Close the file that this handler writes to, if it is its own."""
        if self.file is not None:
            self.file.close()
        super().close()

    def lines(self, record: logging.LogRecord, *, colour: bool) -> str:
        clock = _clock(int(record.created))
        prefix = f"{clock} [{record.levelname}|{self.place}]"
        if colour:
            prefix = f"{COLOURS.get(record.levelno, ERROR_COLOUR)}{prefix}{RESET}"
        return "\n".join(f"{prefix}: {line}" for line in self._printable(record))

    @staticmethod
    def _printable(record: logging.LogRecord) -> list[str]:
        """The message's lines; worked out once for all handlers."""
        lines: list[str] | None = getattr(record, "printable", None)
        if lines is None:
            lines = record.printable = printable(record.getMessage()).split("\n")
        return lines


@lru_cache(maxsize=1)
def _clock(second: int) -> str:
    return time.strftime("%m/%d/%Y %H:%M:%S", time.localtime(second))


def setup(
    *,
    dp: int = 0,
    pp: int = 0,
    tp: int = 0,
    rank: int = 0,
    level: str = "info",
    replica_level: str = "info",
    stream: TextIO | None = None,
) -> None:
    """Set where and who this process is; again whenever that changes. `replica_level` is for the ranks other than 0.

    Without `stream`, lines go to whatever sys.stdout is at that moment.
    """
    for handler in LOGGER.handlers[1:]:
        handler.close()
    LOGGER.handlers[:] = [RankHandler(place=f"DP={dp}|PP={pp}|TP={tp}", rank=rank, stream=stream)]
    LOGGER.setLevel((level if rank == 0 else replica_level).upper())
    LOGGER.propagate = False
    LOGGER.disabled = False


def to_file(path: Path) -> None:
    """Also append every line to a file, without colour; its folder is made if need be. A later `setup` ends that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = _handler()
    file = path.open("a", encoding="utf-8")
    second = RankHandler(place=first.place, rank=first.rank, stream=file)
    second.file = file
    LOGGER.addHandler(second)


def debug(message: str) -> None:
    """Print on rank 0."""
    _say(message, logging.DEBUG)


def info(message: str) -> None:
    """Print on rank 0."""
    _say(message, logging.INFO)


def warning(message: str) -> None:
    """Print on rank 0."""
    _say(message, logging.WARNING)


def error(message: str) -> None:
    """Print on rank 0; what befalls one rank alone is said with `all_ranks`."""
    _say(message, logging.ERROR)


def all_ranks(message: str, *, level: str = "info") -> None:
    """Print on every rank that calls it, if its own level lets it."""
    _handler()
    _log(message, logging.getLevelNamesMapping()[level.upper()])


def once(message: str, *, key: str | None = None, level: str = "warning") -> None:
    """Print on rank 0 the first time that `key` (the message itself if there is none) is seen."""
    handler = _handler()
    if (key or message) not in handler.said:
        handler.said.add(key or message)
        _say(message, logging.getLevelNamesMapping()[level.upper()])


def print_through(printer: Callable[[str], None] | None) -> None:
    """Hand finished lines to a live display, which prints them above itself; None gives them back to the stream."""
    _handler().printer = printer


def printable(text: str) -> str:
    """`text` with its credentials masked and its control characters (all but tab and newline) written out."""
    text = mask(text)
    return text if text.isprintable() else text.translate(ESCAPES)


def mask(text: str) -> str:
    """`text` without the values of secret environment variables and without logins and signatures in URLs."""
    for secret in SECRETS.values():
        text = text.replace(secret, "***")
    if "://" in text:
        text = URL_SIGNATURE.sub(r"\1=***", URL_LOGIN.sub("***@", text))
    return text


class _Secrets:
    """Values of secret environment variables, the longest first: one may begin with another.

    Looked up again when there are more or fewer variables, and every second: a lookup takes longer than a line.
    """

    def __init__(self) -> None:
        self._known: list[str] = []
        self._found = (-1, 0.0)  # number of variables, and when

    def values(self) -> list[str]:
        """The values."""
        count, now = len(os.environ), time.monotonic()
        if count != self._found[0] or now > self._found[1] + 1.0:
            found = [v for name, v in os.environ.items() if len(v) >= SECRET_LENGTH and SECRET_NAME.search(name)]
            self._known = sorted(found, key=len, reverse=True)
            self._found = count, now
        return self._known


SECRETS = _Secrets()


def human(x: float) -> str:
    """`x` in three significant digits with a suffix, as in Nanotron's logs: 512, 1.02K, 67.4M, 952G, 0.000296."""
    if abs(x) < 1 or not math.isfinite(x):
        return f"{x:.3g}"
    x = float(f"{x:.3g}")
    power = 0
    while abs(x) >= 1000 and power < len(SIZES) - 1:
        x /= 1000
        power += 1
    return (f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}") + SIZES[power]


def _say(message: str, level: int) -> None:
    if _handler().rank == 0:
        _log(message, level)


def _log(message: str, level: int) -> None:
    """Hand a record to the handlers; `LOGGER.log` would look up the calling line first, which no handler prints."""
    if LOGGER.isEnabledFor(level):
        LOGGER.handle(logging.LogRecord(LOGGER.name, level, "", 0, message, None, None))


def _handler() -> RankHandler:
    if not LOGGER.handlers:
        setup()
    handler = LOGGER.handlers[0]
    assert isinstance(handler, RankHandler), f"the logger {LOGGER.name} has a foreign handler: {handler}"
    return handler
