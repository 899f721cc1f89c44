"""Saving a run: at once or beside the next steps, and what an error of it means to the training."""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch

from pentode import device as devices
from pentode import log
from pentode.checkpoint import storage
from pentode.checkpoint.background import Background, HostCache, Snapshot
from pentode.checkpoint.folder import steps
from pentode.checkpoint.keep import prune
from pentode.checkpoint.save import save, size_of
from pentode.checkpoint.upload import most_waiting
from pentode.config.schema import CheckpointsArgs, Config
from pentode.dist.board import Cancelled
from pentode.dist.collectives import beside, gather_objects, max_
from pentode.dist.together import on_first
from pentode.errors import PentodeError, RankError, StorageError, in_words
from pentode.run.build import Run
from pentode.train.copies import Place
from pentode.train.signals import StopSignal
from pentode.train.state import Content, TrainState, content

Published = Callable[[Path], object]
GIB = 2**30
DATASTATES_GIB = 16  # Kenotron's host_cache_size where the file has no datastates section
WHOLE = 2  # updates begun, between which a step was whole
MARGIN = 1 / 20  # of a GPU's memory, which staging a snapshot there leaves free
LOOK = 0.25  # seconds between two looks whether all ranks have saved
ENDING = 5.0  # seconds that a thread has to end when nobody needs its save any more


class Saver:
    """Saves one run, by `checkpoints.checkpointing_engine`; at most one save is under way.

    published  called on this rank with the folder of each checkpoint that is there, by the thread that wrote it
    """

    def __init__(self, run: Run, root: Path, stop: StopSignal, *, published: Sequence[Published] = ()) -> None:
        self.run, self.root, self.stop, self.published = run, root, stop, published
        self.checkpoints = run.config.checkpoints
        self.asynchronous = self.checkpoints.checkpointing_engine != "torch"
        self.last: int | None = None  # the step that was saved last, or is being saved
        self.seconds = 0.0  # that the last complete save took
        self._begun = 0.0
        self._background = Background()
        self._world = beside(run.mesh.world, self._background.cancelled)
        self._cache = host_cache(self.checkpoints, run.device)
        self._lane = devices.Lane(run.device)
        self._snapshot: Snapshot | None = None
        self._room = DeviceRoom(run.device)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._background.busy:
            self._leave(patient=isinstance(value, Exception))

    def save(self, state: TrainState, *, last: bool = False) -> None:
        """Save the run as it stands after `state.step` updates, or begin to; every rank must call. See `settle`."""
        self.settle()
        if self.stop.asked is not None and self.seconds > self.checkpoints.grace_s:
            log.warning(
                f"checkpoints.grace_s: saving took {self.seconds:.0f} s the last time, more than the "
                f"{self.checkpoints.grace_s:g} s that there are; this one may not be finished"
            )
        what = content(self.run, state)
        self.last = state.step
        self._begun = time.monotonic()
        if self.asynchronous:
            self._snapshot = self._take(what)
            snapshot = self._snapshot
            self._background.start(lambda: self._write_beside(what, snapshot))
        else:
            self._judged(lambda: self._write(what), last=last)

    def before_update(self) -> None:
        """Return when weights and optimizer states may change: their snapshot is taken."""
        self._room.step_done()
        if self._snapshot is not None:
            self._snapshot.wait_for_copies()
            self._snapshot = None

    @property
    def failed(self) -> bool:
        """Whether a save beside the training has failed, which `settle` tells of."""
        return self._background.failed

    def settle(self, *, last: bool = False) -> None:
        """Return when no save is under way; every rank must call. Raises what the save raised, as all ranks do.

        `last`: no other save follows, so that an error is one even if `checkpoints.on_save_error` says warn.
        """
        if not self._background.busy:
            return
        if self.run.mesh.world.size > 1:
            self._wait_for_all()
        self._judged(self._background.wait, last=last)

    def _wait_for_all(self) -> None:
        """Return when all ranks' threads have ended; fails, as collectives do, when one of the ranks has died."""
        end = math.inf
        while True:
            busy, failed = not self._background.is_done(within=LOOK), self.failed
            own = torch.tensor([busy, failed], dtype=torch.int64, device=self.run.device)
            any_busy, any_failed = max_(own, self.run.mesh.world).tolist()
            if not any_busy:
                return
            if any_failed and end == math.inf:
                end = time.monotonic() + ENDING  # what is agreed on all know soon; a thread that broke tells nobody
            if time.monotonic() > end:
                self._background.cancelled.set()

    def _judged(self, work: Callable[[], object], *, last: bool) -> None:
        """Do it; a file system's refusal is a warning where the config says so, and another save follows."""
        try:
            work()
        except Cancelled as error:
            raise RankError("saving: it failed on another rank, whose log tells why") from error
        except StorageError as error:
            self.last = None
            if last or self.checkpoints.on_save_error == "stop":
                raise
            log.warning(f"{error}; training goes on")

    def _take(self, what: Content) -> Snapshot:
        size = sum(saved.nbytes for group in what["groups"].values() for saved in group.values())
        if self._room.has(size):
            try:
                return Snapshot(what["groups"], self._cache, self._lane, staged=True)
            except torch.OutOfMemoryError:
                self._room.refuse()
        return Snapshot(what["groups"], self._cache, self._lane, staged=False)

    def _write_beside(self, what: Content, snapshot: Snapshot) -> None:
        def read(group: str) -> Iterator[memoryview]:
            for piece in snapshot.read(group):
                if self._background.cancelled.is_set():
                    raise Cancelled
                yield piece

        try:
            devices.use(self.run.device)
            snapshot.copy()  # before other ranks are heard of, for whom no update should wait
            save(self.root, **what, world=self._world, read=read, cancelled=self._background.cancelled)
        finally:
            snapshot.release()
            if snapshot.staged:
                self._room.given_back()
        if self._background.cancelled.is_set():  # another run may have begun in this folder
            raise Cancelled
        self._tell(what["step"])

    def _write(self, what: Content) -> None:
        save(self.root, **what, world=self.run.mesh.world)
        self._tell(what["step"])

    def _tell(self, step: int) -> None:
        """What follows a save: hooks, and on rank 0 the removal of older checkpoints, but in the grace of a signal."""
        self.seconds = time.monotonic() - self._begun
        refresh(self.published, self.root / str(step))
        kept, uploads = self.checkpoints, self.run.config.uploads  # then what was sent is pruned, by `train/copies.py`
        if kept.keep_last is not None and not uploads and self.run.mesh.world.rank == 0 and self.stop.asked is None:
            try:
                prune(self.root, step, keep_last=kept.keep_last, keep_every=kept.keep_every)
            except PentodeError as error:
                log.warning(f"{error}; older checkpoints could not be removed")

    def _leave(self, *, patient: bool) -> None:
        """Let a save end that was begun, for as long as nobody wants this process to be gone; then give it up."""
        end = time.monotonic() + (self.checkpoints.grace_s if patient else 0.0)
        while not self._background.is_done(within=LOOK) and time.monotonic() < end and self.stop.asked is None:
            continue
        self._background.cancelled.set()
        ended, error = self._background.is_done(within=ENDING), self._background.error
        if not ended or error is not None:
            why = "" if error is None or isinstance(error, Cancelled) else f" ({in_words(error)})"
            log.warning(f"{self.root / str(self.last)}: this checkpoint was given up{why}; those before it stay")


class DeviceRoom:
    """Whether a snapshot fits on the device beside what a step needs at most, as far as whole steps have shown."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._steps = 0  # updates begun while nothing was staged
        self._peak, self._refused = 0, not devices.is_gpu(device)

    def step_done(self) -> None:
        """A step has made its gradients."""
        self._steps += 1

    def has(self, size: int) -> bool:
        """Whether so many bytes fit; nothing may be staged."""
        if self._refused:
            return False
        if self._steps >= WHOLE:
            self._peak = max(self._peak, devices.memory(self.device).peak_allocated)
        room = devices.room_beside(self._peak, self.device)
        return self._peak > 0 and size + MARGIN * devices.total_memory(self.device) <= room

    def given_back(self) -> None:
        """Nothing is staged any more: what steps need is seen anew, since one may need more than those before."""
        devices.reset_peak_memory(self.device)
        self._steps = 0

    def refuse(self) -> None:
        """It did not fit after all: nothing is staged any more."""
        self._refused = True


def refresh(views: Sequence[Callable[[Path], object]], path: Path) -> None:
    """Bring reports and the like up to date; one that cannot be written must not end a run."""
    for view in views:
        try:
            view(path)
        except Exception as error:  # noqa: BLE001
            name = type(error).__name__
            log.warning(f"{path}: a report could not be written, training goes on ({name}: {error})")


def check_room(run: Run, state: TrainState, root: Path) -> None:
    """Refuse to train where the disk has no room for the checkpoints that stay and one more; every rank must call.

    Where all stay, room for two is asked for, and a warning tells if those to come do not fit.
    """
    c = run.config.checkpoints
    to_come = saves_to_come(run.config, state.step)
    if not (c.check_free_space and to_come):
        return
    what, world, place = content(run, state), run.mesh.world, Place.of(run.config)
    goes = place is not None and place.remove  # each, when it is in the store
    files = what["files"] if world.rank == 0 else {}
    size = sum(gather_objects(size_of(what["groups"], files), world))
    weights = {"weights": what["groups"]["weights"]}
    folder = sum(gather_objects(size_of(weights, files), world)) if c.save_hf else 0

    def look() -> None:
        with storage.explained(root):
            free = shutil.disk_usage(root).free
        kept = _beside_another(c, place)
        count = max(1, min(to_come, kept + 1 - min(kept, len(steps(root)))))
        if count * (size + folder) > free:
            elsewhere = "staging_path" if place is not None and place.is_the_run else "checkpoints_path"
            beside = f" with Hugging Face folders of {folder:,} bytes" if folder else ""
            raise StorageError(
                f"{root}: checkpoints of {size:,} bytes, {count} more of which must fit at a time{beside}, but "
                f"{free:,} bytes are free; remove files, point checkpoints.{elsewhere} at another disk, or set "
                "checkpoints.check_free_space to false"
            )
        if c.keep_last is None and not goes and to_come * (size + folder) > free:
            fit = free // (size + folder)
            log.warning(f"{root}: of {to_come} checkpoints to come {fit} fit on the disk; set keep_last")

    on_first(look, world)


def _beside_another(c: CheckpointsArgs, place: Place | None) -> int:
    """How many checkpoints may stand in the run's folder while another is saved; 1 where all stay."""
    if place is not None and place.remove:
        return most_waiting(folders=c.save_hf)
    if c.keep_last is None:
        return 1
    return c.keep_last + (0 if place is None else most_waiting(folders=False))  # what is not sent is not pruned


def saves_to_come(config: Config, step: int) -> int:
    """How many checkpoints a run writes after `step`."""
    c, last = config.checkpoints, config.tokens.train_steps
    count = last // c.checkpoint_interval - step // c.checkpoint_interval
    final = c.save_final_state and last % c.checkpoint_interval != 0
    return count + int(final) + int(c.save_initial_state and step == 0)


def host_cache(checkpoints: CheckpointsArgs, device: torch.device) -> HostCache:
    """The host's memory for snapshots: what the datastates engine is given, else as much as they need."""
    if checkpoints.checkpointing_engine != "datastates":
        return HostCache(device)
    options = checkpoints.datastates
    if options is None:
        return HostCache(device, limit=DATASTATES_GIB * GIB)
    return HostCache(device, limit=options.host_cache_size * GIB, pinned=options.pin_host_cache)
