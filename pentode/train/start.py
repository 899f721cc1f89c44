"""From a config to a trained model: join the world, find where to go on from, build, train, close."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from pprint import pformat

import torch
from torch.distributed import Store

from pentode import device as devices
from pentode import log
from pentode.checkpoint import storage
from pentode.checkpoint.folder import Checkpoint
from pentode.checkpoint.lock import locked
from pentode.checkpoint.proof import find_together, newest_together
from pentode.checkpoint.save import clean, remove_run
from pentode.config.check import problems
from pentode.config.schema import Config, expand_run_name
from pentode.dist import launch
from pentode.dist.collectives import wait_for_all
from pentode.dist.leaving import heard_by_others
from pentode.dist.mesh import coordinates, everyone
from pentode.dist.together import on_first, tell_once, together
from pentode.errors import CheckpointError, ConfigError, Interrupted, PentodeError, Preempted, on_all_ranks
from pentode.metrics.jsonl import NAME as METRICS
from pentode.metrics.sinks import Sinks, open_sinks
from pentode.run.agree import check_agreement
from pentode.run.ahead import loading_ahead
from pentode.run.build import Run, build, initialise_weights
from pentode.train.copies import Copies, Place, borrow, give_back
from pentode.train.loop import train
from pentode.train.saving import Published, check_room, refresh
from pentode.train.signals import StopSignal
from pentode.train.state import TrainState, check_data, restore

AfterSave = Callable[[Path], object]
AtEnd = Callable[[Run, Path], object]


def start(
    config: Config,
    *,
    notes: Sequence[str] = (),
    fresh: bool = False,
    after_save: Sequence[AfterSave] = (),
    published: Sequence[Published] = (),
    at_end: Sequence[AtEnd] = (),
    hf_to_come: Callable[[int], bool] | None = None,
) -> None:
    """Train until `tokens.train_steps`, going on from the newest checkpoint in `checkpoints_path` if there is one.

    notes       what the config's author should know, printed first
    fresh       remove the run that stands there, and begin again
    after_save  called on rank 0 with the run's folder when a checkpoint was begun
    published   called on rank 0 with the folder of each checkpoint that is there, in the thread that wrote it
    at_end      called with the run and its folder when training is complete
    hf_to_come  whether a step's Hugging Face folder is still to be made of the local checkpoint; None: there are none
    """
    here = launch.world()
    store = launch.meet(here)
    with ExitStack() as joined:
        joined.callback(launch.disconnect)
        joined.enter_context(heard_by_others(store, rank=here.rank))
        device = _join(config, here, store)
        joined.enter_context(loading_ahead(config, device))
        root, world = config.checkpoints.folder, everyone()
        try:
            check_agreement(config, world)  # before anything is touched, and before groups that a layout decides
            with ExitStack() as held:
                on_first(lambda: held.enter_context(locked(root)), world)
                stop = held.enter_context(StopSignal(device, grace_s=config.checkpoints.grace_s))
                copies = held.enter_context(Copies(Place.of(config), root, world, hf_to_come=hf_to_come))
                copies.begin(fresh=fresh)
                if fresh:
                    on_first(lambda: remove_run(root), world)
                together(lambda: _log_to_file(root, here), world)
                for note in notes:
                    log.warning(note)
                sent = [*published, lambda _: copies.after_save()]
                _train_in(root, config, here, stop, copies, after_save, sent, at_end)
        except PentodeError as error:
            if error.everywhere and here.size > 1:
                tell_once(error, rank=here.rank, wait_for_all=wait_for_all)
            raise


def _join(config: Config, here: launch.World, store: Store | None) -> torch.device:
    """Join the run's other processes if none of them has a reason not to; the device of this one."""
    found = problems(config, world_size=here.size)
    found += devices.problems(config.general.device, local_rank=here.local_rank, float8=config.model.float8)
    launch.refuse(found, here, store=store)
    device = devices.pick(config.general.device, local_rank=here.local_rank)
    p = config.parallelism
    place = coordinates(here.rank, pp=p.pp, dp=p.dp, cp=p.context_parallel_size, tp=p.tp)
    log.setup(
        rank=here.rank,
        dp=place["dp"],
        pp=place["pp"],
        tp=place["tp"],
        level=config.logging.log_level,
        replica_level=config.logging.log_level_replica,
    )
    launch.connect(here, backend=devices.backend(device), device=device, store=store)
    return device


def _log_to_file(root: Path, here: launch.World) -> None:
    with storage.explained(root):
        log.to_file(root / "logs" / f"rank-{here.rank}.log")


def _train_in(
    root: Path,
    config: Config,
    here: launch.World,
    stop: StopSignal,
    copies: Copies,
    after_save: Sequence[AfterSave],
    published: Sequence[Published],
    at_end: Sequence[AtEnd],
) -> None:
    last = config.tokens.train_steps
    complete = copies.bring(last=last, fallback=config.checkpoints.on_corrupt == "fallback")
    checkpoint = _source(config, root) if complete is None else None
    if checkpoint is not None and checkpoint.folder.parent == root and checkpoint.step >= last:
        complete = str(checkpoint.folder)
    if complete is not None:
        step = complete.rpartition("/")[2]
        log.info(f"{complete}: complete at step {step}; --fresh starts over, tokens.train_steps goes on")
        copies.finish()
        return
    log.info("Config:\n" + pformat(config, width=120, indent=1))
    log.info("Model Config:\n" + pformat(config.model.model_config, width=120, indent=1))
    own = checkpoint is not None and checkpoint.folder.parent == root
    run, state = _run(config, here, checkpoint, root)
    give_back(root, run.mesh.world)
    check_room(run, state, root)
    copies.go_on()
    name = expand_run_name(config)
    opened = on_first(lambda: open_sinks(config, run=name, resume_step=state.step), run.mesh.world)
    sinks = opened or Sinks([])
    status = "failed"
    try:
        with stop.until_saved():
            hooks = {"after_save": after_save, "published": published} if here.rank == 0 else {}
            train(run, state, root=root, sinks=sinks, stop=stop, saved=own, before_save=copies.wait_for_place, **hooks)
            if config.uploads and stop.asked_anywhere(run.mesh.world, step=state.step, now=True)[0]:
                raise stop.error(f"complete at step {state.step}, and not all is in the store")
        status = "done"
    except (Preempted, Interrupted):
        status = "stopped"
        copies.finish_soon(grace_s=config.checkpoints.grace_s)
        raise
    finally:
        sinks.close(status)
        run.feed.stop()
    for finish in at_end:
        finish(run, root)
    if here.rank == 0:
        refresh(after_save, root)
    copies.finish()


def _run(config: Config, here: launch.World, checkpoint: Checkpoint | None, root: Path) -> tuple[Run, TrainState]:
    """The built run and where it stands: at a checkpoint, or at the beginning."""
    counts = checkpoint is not None and (checkpoint.folder.parent == root or config.checkpoints.load_lr_scheduler)
    run = build(config, here, first_step=checkpoint.step + 1 if counts else 1)
    if checkpoint is None:
        log.info("No checkpoint path provided.")
        if (root / METRICS).exists():
            log.warning(f"{root}: holds a run that saved no checkpoint; it begins again, its records are kept beside")
        initialise_weights(run)
        state = TrainState()
    else:
        optimizer = checkpoint.folder.parent == root or config.checkpoints.load_optimizer
        state = restore(run, checkpoint, optimizer=optimizer, counts=counts)
        if state.step >= config.tokens.train_steps:
            problem = (
                f"checkpoints.resume_checkpoint_path: it is at step {state.step} of tokens.train_steps="
                f"{config.tokens.train_steps}; raise that, or set checkpoints.load_lr_scheduler to false"
            )
            raise on_all_ranks(ConfigError([problem]))
        log.info(f"Resuming after step {state.step} of {config.tokens.train_steps}")
    log.info("[Optimizer Building] Using LearningRateForSP as learning rate")
    check_data(run, state)
    return run, state


def _source(config: Config, root: Path) -> Checkpoint | None:
    """The checkpoint to go on from: the run's own newest one, else the one that the config names.

    Rank 0 tidies up what a crash left behind, before the others look.
    """
    world, other = everyone(), config.checkpoints.resume_checkpoint_path
    on_first(lambda: clean(root), world)
    found = newest_together(root, world, quarantine=True, fallback=config.checkpoints.on_corrupt == "fallback")
    if found is not None or other is None:
        return found
    folder = borrow(other, root, world) if isinstance(other, str) else other
    found = find_together(folder, world)
    if found is None:
        raise on_all_ranks(CheckpointError(f"checkpoints.resume_checkpoint_path: {folder} holds no checkpoint"))
    return found
