"""A run's checkpoints in an object store, from its start to its end: rank 0 moves them, all ranks hear how it went."""

import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pentode import log
from pentode.checkpoint import storage
from pentode.checkpoint.folder import DamagedError, steps
from pentode.checkpoint.keep import prune
from pentode.checkpoint.remote import Remote, bring_newest, locate
from pentode.checkpoint.retry import Patience
from pentode.checkpoint.save import clean
from pentode.checkpoint.upload import Uploader
from pentode.config.schema import Config
from pentode.dist.collectives import gather_objects
from pentode.dist.mesh import Axis
from pentode.dist.together import on_first, on_first_at_length
from pentode.errors import CheckpointError, ConfigError, StorageError, on_all_ranks
from pentode.metrics.jsonl import NAME as METRICS
from pentode.train.signals import StopSignal

BORROWED = "from-s3"  # folder in a run's, of a checkpoint of another run that it begins with
LONGEST_WAIT = 600.0  # seconds that training waits for a place among those that are to be sent
TICK = 0.5  # seconds between two looks at that
AT_THE_END = 2 * 3600.0  # seconds that a finished run waits for its uploads
WHEN_STOPPED = 20.0  # seconds that a preempted one does at most, whatever its grace


@dataclass(frozen=True)
class Place:
    """Where copies go: the address, and whether the run lives there (else they are copies of local checkpoints).

    remove      the local checkpoints that were sent
    keep_last   of those where the run lives, so many of the newest stay, and those of steps that `keep_every` divides
    transfers   requests that are under way at a time, `parts` of them for one file
    """

    url: str
    is_the_run: bool
    remove: bool
    keep_last: int | None = None
    keep_every: int | None = None
    transfers: int | None = None
    parts: int | None = None

    @staticmethod
    def of(config: Config) -> "Place | None":
        """What the config asks for; None where checkpoints stay local."""
        c, upload = config.checkpoints, config.s3_upload
        if isinstance(c.checkpoints_path, str):
            return Place(
                c.checkpoints_path, is_the_run=True, remove=True, keep_last=c.keep_last, keep_every=c.keep_every
            )
        if upload is None:
            return None
        return Place(
            upload.upload_s3_path,
            is_the_run=False,
            remove=upload.remove_after_upload,
            keep_last=c.keep_last,
            keep_every=c.keep_every,
            transfers=upload.s5cmd_numworkers,
            parts=upload.s5cmd_concurrency,
        )


class Copies:
    """Entered while a run has its folder. All ranks call each method; without a `place` all of them do nothing.

    hf_to_come  whether a step's Hugging Face folder is still to be made of the local checkpoint; None: there are none
    """

    def __init__(
        self, place: Place | None, root: Path, world: Axis, *, hf_to_come: Callable[[int], bool] | None = None
    ) -> None:
        self.place, self.root, self.world, self.hf_to_come = place, root, world, hf_to_come
        self.remote: Remote | None = None  # on rank 0, as is the uploader
        self.uploader: Uploader | None = None
        self.waited = 0.0  # seconds that training waited for a place

    def __enter__(self) -> "Copies":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.uploader is not None:
            left = self.uploader.unsent()
            self.uploader.close()
            if left:
                log.warning(f"{self._unsent(left)}; the next start sends what is missing")

    def begin(self, *, fresh: bool) -> None:
        """Reach the store; `fresh`: remove the run there, if the store is where it lives."""
        place = self.place
        if place is None:
            return

        def reach() -> None:
            self.remote = Remote(place.url, transfers=place.transfers, parts=place.parts)
            self.remote.prepare()
            if fresh and place.is_the_run:
                self.remote.remove_run()
            elif fresh and self.remote.steps(self.remote.patience()):
                problem = (
                    f"--fresh: {place.url} holds the copies of a run, which it does not remove; remove them yourself, "
                    "or set s3_upload.upload_s3_path to another address"
                )
                raise ConfigError([problem])

        on_first_at_length(reach, self.world)

    def bring(self, *, last: int, fallback: bool = True) -> str | None:
        """Have the run's newest good checkpoint in its folder, wherever it is now.

        Where only the store has step `last` or a later one, nothing is fetched: the address of what is complete there.
        Without `fallback` a damaged newest one is a CheckpointError.
        """
        if self.place is None:
            return None
        complete, fetched = gather_objects(
            on_first_at_length(lambda: self._brought(last, fallback), self.world), self.world
        )[0]
        if self.remote is not None:
            self.uploader = Uploader(
                self.remote,
                self.root,
                remove=self.place.remove,
                fetched=fetched,
                hf_to_come=self.hf_to_come,
                sent=self._prune,
            )
        return complete

    def _brought(self, last: int, fallback: bool) -> tuple[str | None, int | None]:
        assert self.remote is not None, "bring() before begin()"
        clean(self.root)
        patience = self.remote.patience()
        if not any(int(path.name) >= last for path in steps(self.root)):
            for step in self.remote.steps(patience):
                with suppress(DamagedError):
                    if step >= last and self.remote.entry(patience, step) is not None:
                        return f"{self.remote.url}/{step}", None
        fetched = bring_newest(self.root, self.remote, fallback=fallback)
        if fetched is not None:
            self.remote.fetch_run_file(METRICS, self.root, patience)
        return None, fetched

    def go_on(self) -> None:
        """Send what a former process left unsent; what this one goes on from has been read by all ranks."""
        if self.uploader is not None:
            self.uploader.collect()

    def wait_for_place(self, step: int, stop: StopSignal) -> None:
        """Return when one more checkpoint may be saved: uploads keep up, waiting is in vain, or the run is to stop."""
        if self.place is None:
            return
        began, full = time.monotonic(), True
        while full:
            waited = time.monotonic() - began
            full = self.uploader is not None and waited < LONGEST_WAIT and not self.uploader.has_place(within=TICK)
            asked, full = stop.asked_anywhere(self.world, step=step, now=True, trouble=full)
            if asked:
                return
            if full and self.uploader is not None:
                log.once(
                    f"{self.place.url}: uploads are slower than saves; training waits for them", key="slow uploads"
                )
                self.waited += TICK

    def after_save(self) -> None:
        """Send what has been saved; on rank 0, from any thread."""
        if self.uploader is not None:
            self.uploader.collect()

    def finish(self) -> None:
        """Wait until all is sent. Raises StorageError, on all ranks, where something could not be."""
        if self.place is None:
            return
        if self.uploader is not None:
            self.uploader.try_all_again()
        self._wait(AT_THE_END, folders=True)
        on_first_at_length(self._close_the_books, self.world)

    def finish_soon(self, *, grace_s: float) -> None:
        """Wait for what is under way, for a third of `grace_s` at most: the run was asked to stop, and has saved.

        Its next start sends the rest.
        """
        if self.place is not None:
            self._wait(min(WHEN_STOPPED, grace_s / 3))

    def _wait(self, seconds: float, *, folders: bool = False) -> None:
        uploader = self.uploader
        if uploader is not None and not uploader.wait(0.0, folders=folders):
            steps = ", ".join(map(str, uploader.needed() if folders else uploader.unsent()))
            log.info(f"Waiting for the upload of checkpoint {steps}, up to {seconds:.0f} s")
        on_first_at_length(lambda: None if uploader is None else uploader.wait(seconds, folders=folders), self.world)

    def _close_the_books(self) -> None:
        """Send the records as they are at the end, where all checkpoints are there; on rank 0."""
        assert self.uploader is not None, "finish() before bring()"
        assert self.remote is not None, "finish() before begin()"
        assert self.place is not None, "nothing is sent anywhere"
        left = self.uploader.unsent()
        if left:
            why = next(iter(self.uploader.failed.values()), "it takes too long")
            self.uploader.failed.clear()
            raise StorageError(f"{self._unsent(left)}: {why}; the same command sends what is missing")
        self.remote.send_run_files(self.root, self.remote.patience())
        missing = self.uploader.needed()
        if missing:
            which = ", ".join(map(str, missing))
            log.warning(f"{self.place.url}/hf: no folder of {which} yet; the same command sends what is missing")
        if self.waited >= 1.0:
            log.info(f"Training waited {self.waited:.0f} s for uploads")

    def _prune(self, step: int, patience: Patience) -> Collection[int]:
        """Remove what `keep_last` lets go, where the run lives, now that a step is in the store; the uploader calls.

        Returns the steps that went from the store.
        """
        place, remote, uploader = self.place, self.remote, self.uploader
        if place is None or place.keep_last is None or remote is None or uploader is None:
            return ()
        last, every = place.keep_last, place.keep_every
        if place.is_the_run:
            return remote.prune(patience, keep_last=last, keep_every=every)
        newest = max(step, uploader.newest_sent() or 0)
        prune(self.root, newest, keep_last=last, keep_every=every, spared=uploader.needed())
        return ()

    def _unsent(self, steps: list[int]) -> str:
        assert self.place is not None, "nothing is sent anywhere"
        which = f"checkpoint {steps[0]} is" if len(steps) == 1 else f"checkpoints {', '.join(map(str, steps))} are"
        return f"{self.place.url}: {which} not in the store yet, and kept in {self.root}"


def borrow(url: str, root: Path, world: Axis) -> Path:
    """Bring the checkpoint that another run has in a store, its newest or the one named, into a folder of `root`.

    Returns its folder, on all ranks; `give_back` removes it.
    """

    def bring() -> int | None:
        folder = root / BORROWED
        with storage.explained(root):
            if folder.exists():
                storage.remove(folder)
            storage.make_folder(folder)
        run, step = locate(url)
        if step is None:
            return bring_newest(folder, run, quarantine=False)
        run.fetch(step, folder, run.patience(step))
        return step

    step = gather_objects(on_first_at_length(bring, world), world)[0]
    if step is None:
        problem = f"checkpoints.resume_checkpoint_path: {url} holds no checkpoint"
        raise on_all_ranks(CheckpointError(problem))
    return root / BORROWED / str(step)


def give_back(root: Path, world: Axis) -> None:
    """Remove what `borrow` brought, when all ranks have come here and so have read it."""

    def remove() -> None:
        if (root / BORROWED).exists():
            with storage.explained(root):
                storage.remove(root / BORROWED)

    gather_objects(None, world)
    on_first(remove, world)
