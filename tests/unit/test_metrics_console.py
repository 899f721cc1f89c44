"""The iteration line, letter for letter, and the live line on a terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from pentode import log
from pentode.metrics.console import Console, clock, iteration_line
from pentode.metrics.record import Record

# Lines 1, 3 and 12 of the tutorial's log, and the numbers behind them.
FIRST = (
    "iteration: 1 / 15 | consumed_tokens: 512 | elapsed_time_per_iteration_ms: 4.71K | tokens_per_sec: 109 | "
    "tokens_per_sec_per_gpu: 109 | global_batch_size: 2 | lm_loss: 5.32 | lr: 0.00015 | "
    "model_tflops_per_gpu: 1.87e-05 | hardware_tflops_per_gpu: 1.87e-05 | grad_norm: 2.96 | "
    "cuda_memory_allocated: 67.4M | cuda_max_memory_reserved: 520M | hd_total_memory_tb: 2.13T | "
    "hd_used_memory_tb: 952G | hd_free_memory_tb: 1.18T"
)
THIRD = (
    "iteration: 3 / 15 | consumed_tokens: 1.54K | elapsed_time_per_iteration_ms: 10 | tokens_per_sec: 51.2K | "
    "tokens_per_sec_per_gpu: 51.2K | global_batch_size: 2 | lm_loss: 5.28 | lr: 0.000296 | "
    "model_tflops_per_gpu: 0.00881 | hardware_tflops_per_gpu: 0.00881 | grad_norm: 3.31 | "
    "cuda_memory_allocated: 67.4M | cuda_max_memory_reserved: 520M | hd_total_memory_tb: 2.13T | "
    "hd_used_memory_tb: 952G | hd_free_memory_tb: 1.18T"
)
TWELFTH = (
    "iteration: 12 / 15 | consumed_tokens: 6.14K | elapsed_time_per_iteration_ms: 9.3 | tokens_per_sec: 55K | "
    "tokens_per_sec_per_gpu: 55K | global_batch_size: 2 | lm_loss: 5.22 | lr: 4.65e-05 | "
    "model_tflops_per_gpu: 0.00947 | hardware_tflops_per_gpu: 0.00947 | grad_norm: 3.24"
)
MEMORY = {
    "cuda_memory_allocated": 67_412_992,
    "cuda_max_memory_reserved": 520_093_696,
    "hd_total_memory_tb": 2_130_000_000_000,
    "hd_used_memory_tb": 952_000_000_000,
    "hd_free_memory_tb": 1_178_000_000_000,
}


def a_record(step: int, **facts: float) -> Record:
    return Record(**{"step": step, "lm_loss": 5.0, "consumed_tokens": 512 * step, "global_batch_size": 2} | facts)


def speed(*, ms: float, tokens: float, tflops: float) -> dict[str, float]:
    return {
        "elapsed_time_per_iteration_ms": ms,
        "tokens_per_sec": tokens,
        "tokens_per_sec_per_gpu": tokens,
        "model_tflops_per_gpu": tflops,
        "hardware_tflops_per_gpu": tflops,
    }


@pytest.mark.parametrize(
    ("line", "record"),
    [
        (
            FIRST,
            a_record(
                1, lm_loss=5.3214, lr=0.00015, grad_norm=2.958, **speed(ms=4712, tokens=108.7, tflops=1.87e-5), **MEMORY
            ),
        ),
        (
            THIRD,
            a_record(
                3, lm_loss=5.281, lr=2.958e-4, grad_norm=3.31, **speed(ms=10.0, tokens=51190, tflops=0.00881), **MEMORY
            ),
        ),
        (
            TWELFTH,
            a_record(12, lm_loss=5.2202, lr=4.65e-5, grad_norm=3.2401, **speed(ms=9.3, tokens=55040, tflops=0.00947)),
        ),
    ],
)
def test_the_line_is_the_tutorials(line: str, record: Record) -> None:
    assert iteration_line(record, 15) == line


def test_memory_on_a_quiet_step_stays_out_of_the_line() -> None:
    known = a_record(12, cuda_memory_allocated=67_412_992, cuda_max_memory_reserved=520_093_696)
    assert "memory" not in iteration_line(known, 15)


def test_what_is_ours_comes_last() -> None:
    record = a_record(2, val_loss=5.1234, mfu=0.4512, mfu_causal=0.41, **MEMORY)
    assert iteration_line(record, 15).endswith(
        " | hd_free_memory_tb: 1.18T | val_loss: 5.12 | mfu: 0.451 | mfu_causal: 0.41"
    )


def test_lines_come_at_the_interval_the_ends_and_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup()
    console = Console(train_steps=25, interval=10)
    console.start({})
    for step in range(1, 26):
        console.log(a_record(step, **({"val_loss": 5.0} if step == 13 else {})))
    console.close("done")
    out = capsys.readouterr().out
    assert [int(n) for n in re.findall(r"iteration: (\d+) / 25", out)] == [1, 10, 13, 20, 25]
    assert "\x1b" not in out
    assert "\r" not in out


LIVE = """
from pentode import log
from pentode.metrics.console import Console
from pentode.metrics.record import Record
log.setup()
console = Console(train_steps=9, interval=4)
console.start({})
for step in range(1, 10):
    loss = 5.0 if step == 4 else None
    console.log(Record(step=step, lm_loss=4.0, val_loss=loss, consumed_tokens=step, global_batch_size=1))
    if step == 6:
        log.warning("Saving checkpoint at checkpoints/6")
        print("a stray print")
console.close("done")
log.info("after")
"""


def test_the_live_line_tears_no_log_line_and_leaves_nothing() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 90, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "90"}
    process = subprocess.Popen([sys.executable, "-c", LIVE], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    raw = b""
    try:
        while chunk := os.read(ours, 65536):
            raw += chunk
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    text = raw.decode()
    assert "loss 4.0000" in text
    assert "val 5.0000" in text
    assert "9/9" in text
    kept = screen(text)
    words = [
        "iteration: 1 /",
        "iteration: 4 /",
        "Saving checkpoint",
        "a stray print",
        "iteration: 8 /",
        "iteration: 9 /",
    ]
    assert len(kept) == len([*words, "after"])
    assert all(word in line for word, line in zip([*words, "after"], kept, strict=True))
    assert text.index("\x1b[?25l") < text.index("\x1b[?25h") < text.index("loss 4.0000")  # a kill leaves a cursor


def screen(text: str) -> list[str]:
    """What a terminal shows in the end, of the few control sequences that a live line uses."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece == "\x1b[1A":
            row -= 1
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif piece[0] != "\x1b":
            lines[row] = lines[row][:column].ljust(column) + piece + lines[row][column + len(piece) :]
            column += len(piece)
    return [line for line in lines if line.strip()]


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.2, "0:07"), (750, "12:30"), (11_100, "3:05:00"), (176_400, "2d 01:00:00")]
)
def test_durations_read_as_clocks(seconds: float, text: str) -> None:
    assert clock(seconds) == text
