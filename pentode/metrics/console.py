"""The iteration line, and on a terminal a live line below it."""

import sys
import time
from typing import TYPE_CHECKING

from pentode import log
from pentode.metrics.record import Record

if TYPE_CHECKING:
    from rich.table import Table

# The names, their order and human() are what Nanotron's users have scripts for; what is ours comes after them.
FIELDS = (
    "consumed_tokens",
    "elapsed_time_per_iteration_ms",
    "tokens_per_sec",
    "tokens_per_sec_per_gpu",
    "global_batch_size",
    "lm_loss",
    "lr",
    "model_tflops_per_gpu",
    "hardware_tflops_per_gpu",
    "grad_norm",
)
MEMORY_FIELDS = (
    "cuda_memory_allocated",
    "cuda_max_memory_reserved",
    "hd_total_memory_tb",
    "hd_used_memory_tb",
    "hd_free_memory_tb",
)
OUR_FIELDS = ("val_loss", "mfu", "mfu_causal")

REFRESH = 0.1  # seconds between two drawings of the live line
BAR_WIDTH = 28  # columns


def iteration_line(record: Record, train_steps: int) -> str:
    """`iteration: 3 / 15 | consumed_tokens: 1.54K | ...`; memory only where the record knows the disk."""
    names = FIELDS + (MEMORY_FIELDS if record.hd_total_memory_tb is not None else ()) + OUR_FIELDS
    known = ((name, getattr(record, name)) for name in names)
    items = [f"{name}: {log.human(value)}" for name, value in known if value is not None]
    return " | ".join([f"iteration: {record.step} / {train_steps}", *items])


class Console:
    """Prints the line of the first step, of every `interval`-th, of those with a validation loss and of the last."""

    def __init__(self, *, train_steps: int, interval: int) -> None:
        self.train_steps = train_steps
        self.interval = interval
        self.progress: Progress | None = None

    def start(self, info: dict[str, object]) -> None:
        if sys.stdout.isatty():
            self.progress = Progress(train_steps=self.train_steps)

    def log(self, record: Record) -> None:
        due = record.step in (1, self.train_steps) or record.step % self.interval == 0 or record.val_loss is not None
        if due:
            log.info(iteration_line(record, self.train_steps))
        if self.progress is not None:
            self.progress.update(record)

    def close(self, status: str) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class Progress:
    """The live line: how far, how good, how fast, how long still. Drawn at most ten times a second.

    While it lives, log lines and prints go through it, so that nothing tears.
    """

    def __init__(self, *, train_steps: int) -> None:
        from rich.live import Live

        self.train_steps = train_steps
        self.val_loss: float | None = None
        self.drawn = 0.0
        self.first: tuple[int, float] | None = None  # step and time of the first record: compilation is behind it
        self.live = Live(auto_refresh=False, transient=True)
        self.live.start()
        self.live.console.show_cursor(True)  # a run that is killed must not leave a terminal without a cursor
        log.print_through(self._print)

    def update(self, record: Record) -> None:
        now = time.monotonic()
        self.first = self.first or (record.step, now)
        self.val_loss = self.val_loss if record.val_loss is None else record.val_loss
        if now - self.drawn >= REFRESH or record.step == self.train_steps:
            self.drawn = now
            self.live.update(self._line(record, now=now), refresh=True)

    def stop(self) -> None:
        log.print_through(None)
        self.live.stop()

    def _print(self, text: str) -> None:
        from rich.text import Text

        self.live.console.print(Text.from_ansi(text), soft_wrap=True)

    def _line(self, record: Record, *, now: float) -> "Table":
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        numbers = [f"{record.step}/{self.train_steps}", f"[bold]loss {_decimals(record.lm_loss)}[/]"]
        if self.val_loss is not None:
            numbers.append(f"[bold]val {_decimals(self.val_loss)}[/]")
        if record.tokens_per_sec is not None:
            numbers.append(f"{log.human(record.tokens_per_sec)} tokens/s")
        numbers.append(f"[dim]{self._remaining(record.step, now=now)}[/]")
        grid = Table.grid(padding=(0, 2))
        for _ in range(1 + len(numbers)):
            grid.add_column(no_wrap=True)  # a narrow terminal cuts the line; it stays one line
        bar = ProgressBar(
            total=self.train_steps,
            completed=record.step,
            width=BAR_WIDTH,
            complete_style="cyan",
            finished_style="green",
        )
        grid.add_row(bar, *numbers)
        return grid

    def _remaining(self, step: int, *, now: float) -> str:
        if self.first is None or step <= self.first[0]:
            return "eta ..."
        seconds = (now - self.first[1]) / (step - self.first[0]) * (self.train_steps - step)
        return f"eta {clock(seconds)}"


def clock(seconds: float) -> str:
    """Seconds as people write a duration: 0:07, 12:30, 3:05:00, 2d 01:00:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minutes}:{second:02}"


def _decimals(loss: float | None) -> str:
    return "..." if loss is None else f"{loss:.4f}"
