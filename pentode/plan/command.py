"""`pentode plan`: what to print, where to, and what is refused first."""

import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from pentode.config.load import load_config
from pentode.config.tree import COMMAND_LINE
from pentode.errors import ConfigError
from pentode.plan.drawing import STYLES, Line, draw
from pentode.plan.picture import reason_against, write_picture
from pentode.plan.schedule import PipelinePlan, facts, plan_pipeline, program_lines

COLUMNS = 100  # where no terminal says how many it has


def plan_schedule(
    file: Path, overrides: Sequence[str] = (), *, actions: bool = False, save: Path | None = None
) -> None:
    """Print the pipeline schedule of a config, drawn as wide as the terminal; `save` names a picture to write, too.

    Raises ConfigError with all that is wrong, before anything is printed or written.
    """
    against = reason_against(save) if save is not None else None
    found = [f"{COMMAND_LINE}: --save: {against}"] if against else []
    try:
        plan = plan_pipeline(load_config(file, overrides))
    except ConfigError as error:
        raise ConfigError([*found, *error.problems]) from None
    if found:
        raise ConfigError(found)
    if save is not None:
        write_picture(plan, save)
    width = shutil.get_terminal_size((COLUMNS, 0)).columns
    show(_lines(plan, width=width, actions=actions, save=save), sys.stdout)


def show(lines: Iterable[Line], stream: TextIO) -> None:
    """Print lines: in colour on a terminal, else as plain ASCII."""
    if not stream.isatty():
        for line in lines:
            stream.write("".join(text for text, _ in line) + "\n")
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream)
    for line in lines:
        console.print(Text.assemble(*((text, STYLES[mark]) for text, mark in line)), soft_wrap=True)


def _lines(plan: PipelinePlan, *, width: int, actions: bool, save: Path | None) -> Iterable[Line]:
    yield from ([(text, "")] for text in facts(plan))
    yield []
    yield from draw(plan, width=width)
    if actions:
        yield []
        yield from ([(text, "")] for text in program_lines(plan, width=width))
    if save is not None:
        yield from ([], [(f"wrote {save}", "")])
