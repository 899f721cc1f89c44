"""The commands. Each imports what it needs when it runs, so that help, check and completion never load torch."""

import gc
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from pentode.errors import INTERNAL, ConfigError, PentodeError, Preempted, exit_code
from pentode.garbage import uncollected
from pentode.version import VERSION

UsageError = typer.BadParameter.__base__  # click's, or the one that newer typers bring along
INTERRUPTED = 130
IN_S3 = "s3://"

app = typer.Typer(
    name="pentode",
    help="Pretrain transformer language models on a laptop's CPU, one GPU, or a cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _complete_override(incomplete: str) -> list[str]:
    from pentode.config.editor import field_paths

    return [f"{path}=" for path in field_paths() if path.startswith(incomplete)]


File = Annotated[Path, typer.Argument(help="a YAML config", metavar="FILE")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="a.b.c=value, applied after the file", autocompletion=_complete_override, metavar="[a.b.c=value]..."
    ),
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and stop")] = False) -> None:
    if version:
        typer.echo(f"pentode {VERSION}")
        raise typer.Exit


@app.command()
def train(
    file: File,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="start this many local processes")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="remove the run in checkpoints_path and start over")] = False,
) -> None:
    """Train the model that FILE describes; the same command again goes on where the run stopped."""
    with _preemptible(), uncollected():
        _train(file, overrides or [], nproc=nproc, fresh=fresh)


def _train(file: Path, overrides: list[str], *, nproc: int, fresh: bool) -> None:
    from pentode.config.load import load_with_notes

    try:
        config, notes = load_with_notes(file, overrides)
        if nproc > 1 and launched():
            raise ConfigError([f"command line: --nproc {nproc} in a process that a launcher started; leave out one"])
    except ConfigError as error:
        if launched():
            _refuse_on_all_ranks(error)
        raise
    if nproc > 1:
        from pentode.config.check import problems
        from pentode.dist.launch import start_local

        found = problems(config, world_size=nproc)
        if found:
            raise ConfigError(found)
        arguments = ["train", str(file), *overrides, *(["--fresh"] if fresh else [])]
        raise typer.Exit(start_local(nproc, arguments))

    from pentode.convert.beside import HFFolders
    from pentode.dist import launch
    from pentode.dist.together import on_first_at_length
    from pentode.generate.closing import closing_sample
    from pentode.report.page import write_report
    from pentode.train.saving import Published
    from pentode.train.start import AtEnd, start

    published: list[Published] = []
    at_end: list[AtEnd] = [closing_sample]
    with ExitStack() as held:
        folders = HFFolders(config.checkpoints.folder) if config.checkpoints.save_hf else None
        if folders is not None:
            if launch.world().rank == 0:
                held.enter_context(folders)
            published.append(folders.renew)
            at_end.append(lambda run, root: on_first_at_length(folders.finish, run.mesh.world))
        start(
            config,
            notes=notes,
            fresh=fresh,
            after_save=[write_report],
            published=published,
            at_end=at_end,
            hf_to_come=None if folders is None else folders.is_to_come,
        )


def launched() -> bool:
    """Whether torchrun or srun started this process among others; to ask `dist/launch.py` would load torch."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ or tasks != "1"


def _refuse_on_all_ranks(error: ConfigError) -> None:
    """Tell the run's other processes of a config that is wrong, perhaps only here, and raise what all of them do."""
    from pentode.dist import launch

    here = launch.world()
    launch.refuse(error.problems, here, store=launch.meet(here))


@contextmanager
def _preemptible() -> Iterator[None]:
    """A scheduler's signal ends what begins a run (it takes seconds to load torch) with the code that asks for more."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Preempted(f"{signal.Signals(number).name}: nothing was trained yet; the same command begins again")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command()
def generate(
    path: Annotated[Path, typer.Argument(help="a checkpoint's folder, or a run's: its newest checkpoint")],
    prompt: Annotated[list[str] | None, typer.Option(help="text to go on from; may be given several times")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="draw from the k likeliest tokens")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="draw from the likeliest tokens of total p")
    ] = None,
    seed: Annotated[int, typer.Option()] = 42,
    device: Annotated[str, typer.Option(help="as general.device in a config")] = "auto",
    tp: Annotated[int, typer.Option(min=1, help="tensor-parallel processes, which are started")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="pipeline stages, each in processes of its own")] = 1,
) -> None:
    """Write text with a trained model."""
    from pentode import log
    from pentode.dist import launch
    from pentode.generate.command import generate_from, refuse_early
    from pentode.generate.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    if tp * pp > 1 and launch.world().size == 1:
        refuse_early(path, prompt or [""], tp=tp, pp=pp)
        options = {"max-new-tokens": max_new_tokens, "temperature": temperature, "top-k": top_k, "top-p": top_p}
        options |= {"seed": seed, "device": device, "tp": tp, "pp": pp}
        words = [f"--{name}={value}" for name, value in options.items() if value is not None]
        words += [f"--prompt={text}" for text in prompt or [""]]
        raise typer.Exit(launch.start_local(tp * pp, ["generate", str(path), *words]))
    log.setup(level="warning")
    for text in generate_from(path, prompt or [""], sampling=sampling, device=device, tp=tp, pp=pp):
        typer.echo(text)


@app.command()
def check(file: File, overrides: Overrides = None) -> None:
    """Validate FILE and print what it means: batch arithmetic, parameters, tokens."""
    from pentode.config.load import load_with_notes
    from pentode.config.meaning import meaning

    config, notes = load_with_notes(file, overrides or [])
    for line in [*meaning(config), *(f"note: {note}" for note in notes)]:
        typer.echo(line)


@app.command()
def plan(
    file: File,
    overrides: Overrides = None,
    schedule: Annotated[bool, typer.Option("--schedule", help="which pipeline rank does what when")] = False,
    actions: Annotated[bool, typer.Option("--actions", help="also print each rank's program")] = False,
    save: Annotated[Path | None, typer.Option(help="also draw it here: .png or .svg", metavar="PICTURE")] = None,
) -> None:
    """Print what FILE will do before it runs: with --schedule, its pipeline's stages and schedule, drawn."""
    if not schedule:
        raise ConfigError(["command line: plan shows one thing so far, and it was not asked for; add --schedule"])
    from pentode.plan.command import plan_schedule

    plan_schedule(file, overrides or [], actions=actions, save=save)


@app.command()
def schema() -> None:
    """Print the config's JSON Schema, from which editors complete and check."""
    import json

    from pentode.config.editor import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run's folder: checkpoints_path")]) -> None:
    """Write report.html and loss.png of a run again."""
    from pentode.report.page import write_report

    typer.echo(f"wrote {write_report(run)}")


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="a checkpoint's folder, a run's, a Hugging Face folder, or Nanotron's")
    ],
    target: Annotated[Path, typer.Argument(help="the folder to write, which must not be there")],
    kind: Annotated[
        str | None, typer.Option("--from", help="pentode, hf or nanotron; else as SOURCE's files say")
    ] = None,
    to: Annotated[str | None, typer.Option(help="hf or pentode; else hf of a checkpoint, pentode of others")] = None,
    dtype: Annotated[str | None, typer.Option(help="round the weights to float32, float64 or bfloat16")] = None,
    max_shard_size: Annotated[str, typer.Option(help="cut a Hugging Face folder's weights into files of this")] = "5GB",
) -> None:
    """Make a Hugging Face folder of a checkpoint, or a checkpoint of a Hugging Face or Nanotron folder."""
    from pentode.convert.command import convert as converted

    for line in converted(source, target, kind=kind, to=to, dtype=dtype, max_shard_size=max_shard_size):
        typer.echo(line)


checkpoints = typer.Typer(help="Look at checkpoints: which there are, whether they are whole, what one holds.")
app.add_typer(checkpoints, name="checkpoint", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@checkpoints.command("list")
def list_checkpoints(
    folder: Annotated[str, typer.Argument(help="a run's folder, or s3:// address: checkpoints_path")],
    as_json: AsJson = False,
    quick: Annotated[bool, typer.Option("--quick", help="compare sizes, read no checksums")] = False,
) -> None:
    """Print a line for each checkpoint in a run's folder, or of a run in an object store."""
    from pentode.checkpoint import remote_survey, survey

    if folder.startswith(IN_S3):
        found = remote_survey.found_in(folder, checksums=not quick)
    else:
        found = survey.survey(Path(folder), checksums=not quick)
    for line in [survey.as_json(found)] if as_json else survey.table(found):
        typer.echo(line)


@checkpoints.command()
def verify(
    path: Annotated[str, typer.Argument(help="a checkpoint's folder or s3:// address, or a run's: all in it")],
) -> None:
    """Compare every file with its checksum; a line for each damage, and exit code 66 if there is any."""
    from pentode.checkpoint import remote_survey, survey

    for line in remote_survey.verify(path) if path.startswith(IN_S3) else survey.verify(Path(path)):
        typer.echo(line)


@checkpoints.command()
def show(
    path: Annotated[str, typer.Argument(help="a checkpoint's folder or s3:// address, or a run's: its newest")],
    as_json: AsJson = False,
) -> None:
    """Print what a checkpoint holds."""
    from pentode.checkpoint import remote_survey, survey

    found = remote_survey.contents(path) if path.startswith(IN_S3) else survey.contents(Path(path))
    for line in [survey.as_json(found)] if as_json else survey.lines(found):
        typer.echo(line)


@app.command()
def doctor() -> None:
    """Print versions, devices and which kernels are usable here; secrets are masked."""
    from pentode.run.doctor import lines

    for line in lines():
        typer.echo(line)


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0, or the code that its error carries (`pentode.errors`)."""
    code = run_command(sys.argv[1:] if arguments is None else arguments)
    if "torch.distributed" in sys.modules:
        gc.collect()  # a process group that stands in a cycle has a thread, which may abort a process as Python ends
    sys.exit(code)


def run_command(arguments: list[str]) -> int:
    """Run a command and return the exit code; what went wrong is a line on stderr, but for our bugs: a traceback."""
    try:
        result = app(arguments, standalone_mode=False, prog_name="pentode")
        return result if isinstance(result, int) else 0
    except BrokenPipeError:  # the reader of our output has seen enough, as in `pentode check FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UsageError as error:
        error.show()
        return ConfigError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001
        return _explain(error)


def _explain(error: Exception) -> int:
    """Say what happened; the exit code."""
    code = exit_code(error)
    if code is None:
        traceback.print_exc()
        return INTERNAL
    if not isinstance(error, PentodeError):
        print(f"pentode: {error}", file=sys.stderr)
    elif not error.told:
        print(error.printed, file=sys.stderr)
    return code
