"""The training loop: step after step, with validation, records and checkpoints between them."""

from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import takewhile
from pathlib import Path

from pentode import device as devices
from pentode import log
from pentode.metrics.sinks import Sinks
from pentode.optim.schedule import learning_rate
from pentode.run.build import Run, memory_line
from pentode.train.collector import Collector
from pentode.train.evaluate import validation_loss
from pentode.train.journal import FIRST_STEPS, Done, Journal
from pentode.train.replay import Steps
from pentode.train.sanity import check_state, check_weights
from pentode.train.saving import Published, Saver, refresh
from pentode.train.signals import StopSignal
from pentode.train.state import TrainState

BeforeSave = Callable[[int, StopSignal], object]


def train(
    run: Run,
    state: TrainState,
    *,
    root: Path,
    sinks: Sinks,
    stop: StopSignal,
    saved: bool = False,
    before_save: BeforeSave | None = None,
    after_save: Sequence[Callable[[Path], object]] = (),
    published: Sequence[Published] = (),
) -> None:
    """Train from `state` to the last step; checkpoints go to `root`. Raises Preempted when `stop` was asked, saved.

    saved        `state` is that of a checkpoint of this run, which may be in a store and here no more
    before_save  called on all ranks with the step, and returns when it may be saved
    after_save   called with `root` when a checkpoint was begun, and the records so far are written
    published    called with the folder of each checkpoint that is there, in the thread that wrote it
    """
    with Saver(run, root, stop, published=published) as saver, Collector() as collector:
        saver.last = state.step if saved else None
        _train(run, state, saver, sinks, before_save, after_save, collector)


def _train(
    run: Run,
    state: TrainState,
    saver: Saver,
    sinks: Sinks,
    before_save: BeforeSave | None,
    after_save: Sequence[Callable[[Path], object]],
    collector: Collector,
) -> None:
    checkpoints, last, root, stop = run.config.checkpoints, run.config.tokens.train_steps, saver.root, saver.stop
    announce(run, state)
    journal, steps = Journal(run, sinks, root), Steps(run, before_update=saver.before_update)

    def save(*, finally_: bool = False) -> None:
        if saver.last != state.step:
            journal.flush()
            with journal.meter.outside():
                check_weights(run)
                check_state(run, state)
                saver.settle()
                if before_save is not None:
                    before_save(state.step, stop)
                log.warning(f"Saving checkpoint at {root / str(state.step)}")
                saver.save(state, last=finally_ or state.step == last)
                refresh(after_save, root)
            journal.show_disk = True

    if checkpoints.save_initial_state and state.step == 0:
        save()
    journal.meter.start(devices.Moment(run.device))
    while state.step < last:
        due = records_are_due(run, state.step)
        asked, trouble = stop.asked_anywhere(run.mesh.world, step=state.step, now=due, trouble=saver.failed)
        if trouble:
            saver.settle()
        if asked:
            if state.step > 0:
                save(finally_=True)
            saver.settle(last=True)
            journal.flush()
            raise stop.error(f"saved after step {state.step}" if state.step else "no step was done yet")
        with journal.kept_if_this_fails():
            done = one_step(run, state, steps)
        journal.add(done)
        collector.step_done()
        if validation_is_due(run, state.step):
            devices.synchronize(run.device)  # the step's own work is not the validation's
            with journal.meter.outside():
                loss = validate(run, state, stop)
            journal.flush(val_loss=loss)
        elif records_are_due(run, state.step):
            journal.want()
        if state.step < FIRST_STEPS:
            log.info(memory_line(run.device))
        if state.step % checkpoints.checkpoint_interval == 0:
            save()
    journal.flush()
    if checkpoints.save_final_state:
        save(finally_=True)
    saver.settle(last=True)


def one_step(run: Run, state: TrainState, steps: Steps) -> Done:
    """Train on the next global batch, and count it in `state`."""
    config, step = run.config, state.step + 1
    stage = run.feed.stage_at(step)
    rate = learning_rate(step, config.optimizer.learning_rate_scheduler, train_steps=config.tokens.train_steps)
    batches = run.feed.batches(
        step, consumed=state.stage_samples.get(stage.name, 0), first_number=state.consumed_samples
    )
    result = steps.do(batches, learning_rate=rate)
    state.advance(run)
    return Done(step, rate, state.consumed_tokens, devices.fetch(result.numbers))


def validate(run: Run, state: TrainState, stop: StopSignal) -> float | None:
    """The validation loss after `state.step`; None if a signal came meanwhile, which does not wait for it to end."""
    alone = run.mesh.world.size == 1  # several ranks could not agree in the middle of it
    batches = takewhile(lambda _: not (alone and stop.asked), run.feed.validation(state.step))
    loss = validation_loss(run, batches)
    return None if alone and stop.asked else loss


def validation_is_due(run: Run, step: int) -> bool:
    """Whether the config asks for a validation loss after `step`: every so many steps, and after the last."""
    tokens = run.config.tokens
    return tokens.val_check_interval > 0 and (step % tokens.val_check_interval == 0 or step == tokens.train_steps)


def records_are_due(run: Run, step: int) -> bool:
    """Whether to read the numbers from the device now: always where that costs nothing, else when a line is printed."""
    tokens, interval = run.config.tokens, run.config.logging.iteration_step_info_interval
    return not devices.is_gpu(run.device) or step % interval == 0 or step in (1, tokens.train_steps)


def announce(run: Run, state: TrainState) -> None:
    """Say what is going to happen, in the words that Nanotron's users know."""
    config, stages, current = run.config, run.feed.stages, run.feed.stage_at(state.step + 1)
    for stage in stages:
        log.info(
            f"[Training Plan] Stage {stage.name} has {stage.remaining(state.step)} remaining training steps and has "
            f"consumed {state.stage_samples.get(stage.name, 0)} samples"
        )
        if stage == current:
            run.feed.open(state.step + 1)
    log.info(f"[Training Plan] There are {len(stages)} training stages")
    for stage in stages:
        log.info(f"[Stage {stage.name}] start from step {stage.first_step}")
    log.info("")
    tokens = config.tokens
    log.info(
        f"[Start training] datetime: {datetime.now()} | mbs: {tokens.micro_batch_size} | "
        f"grad_accum: {tokens.batch_accumulation_per_replica} | global_batch_size: {config.global_batch_size} | "
        f"sequence_length: {tokens.sequence_length} | train_steps: {tokens.train_steps} | "
        f"start_iteration_step: {state.step} | consumed_train_samples: {state.consumed_samples}"
    )
    log.info(
        f"Resuming training from stage {current.name}, it has trained for "
        f"{state.stage_samples.get(current.name, 0)} samples and has "
        f"{current.remaining(state.step)} remaining train steps"
    )
    log.info(memory_line(run.device))
