"""A run's checkpoints in an object store, from its start to its end: rank 0 moves them, all ranks hear how it went."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pentode import log
from pentode.checkpoint import storage
from pentode.checkpoint.folder import DamagedError, steps
from pentode.checkpoint.remote import Remote, bring_newest, locate
from pentode.checkpoint.save import clean
from pentode.checkpoint.upload import Uploader
from pentode.config.schema import Config
from pentode.dist.collectives import gather_objects
from pentode.dist.mesh import Axis
from pentode.dist.together import on_first, on_first_at_length
from pentode.errors import CheckpointError, ConfigError, StorageError, on_all_ranks
from pentode.metrics.jsonl import NAME as METRICS

BORROWED = "from-s3"  # folder in a run's, of a checkpoint of another run that it begins with
AT_THE_END = 2 * 3600.0  # seconds that a finished run waits for its uploads
WHEN_STOPPED = 20.0  # seconds that a preempted one does at most, whatever its grace


@dataclass(frozen=True)
class Place:
    """Where copies go: the address, and whether the run lives there (else they are copies of local checkpoints)."""

    url: str
    is_the_run: bool
    remove: bool
    transfers: int | None = None
    parts: int | None = None

    @staticmethod
    def of(config: Config) -> "Place | None":
        """What the config asks for; None where checkpoints stay local."""
        path, upload = config.checkpoints.checkpoints_path, config.s3_upload
        if isinstance(path, str):
            return Place(path, is_the_run=True, remove=True)
        if upload is None:
            return None
        return Place(
            upload.upload_s3_path,
            is_the_run=False,
            remove=upload.remove_after_upload,
            transfers=upload.s5cmd_numworkers,
            parts=upload.s5cmd_concurrency,
        )


class Copies:
    """Entered while a run has its folder. All ranks call each method; without a `place` all of them do nothing."""

    def __init__(self, place: Place | None, root: Path, world: Axis, *, leave: Callable[[], bool] = bool) -> None:
        self.place, self.root, self.world, self.leave = place, root, world, leave
        self.remote: Remote | None = None  # on rank 0, as is the uploader
        self.uploader: Uploader | None = None

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
                self.remote, self.root, remove=self.place.remove, fetched=fetched, leave=self.leave
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
            self.uploader.begin()

    def after_save(self, root: Path) -> None:
        """Send what has been saved; on rank 0."""
        if self.uploader is not None:
            self.uploader.offer(root)

    def finish(self) -> None:
        """Wait until all is sent. Raises StorageError, on all ranks, where something could not be."""
        if self.place is None:
            return
        if self.uploader is not None:
            self.uploader.try_all_again()
        self._wait(AT_THE_END)
        on_first_at_length(self._close_the_books, self.world)

    def finish_soon(self, *, grace_s: float) -> None:
        """Wait for what is under way, for a third of `grace_s` at most: the run was asked to stop, and has saved.

        Its next start sends the rest.
        """
        if self.place is not None:
            self._wait(min(WHEN_STOPPED, grace_s / 3))

    def _wait(self, seconds: float) -> None:
        uploader = self.uploader
        if uploader is not None and not uploader.wait(0.0):
            steps = ", ".join(map(str, uploader.unsent()))
            log.info(f"Waiting for the upload of checkpoint {steps}, up to {seconds:.0f} s")
        on_first_at_length(lambda: None if uploader is None else uploader.wait(seconds), self.world)

    def _close_the_books(self) -> None:
        """Send the records as they are at the end, where all checkpoints are there; on rank 0."""
        assert self.uploader is not None, "finish() before bring()"
        assert self.remote is not None, "finish() before begin()"
        left = self.uploader.unsent()
        if left:
            why = next(iter(self.uploader.failed.values()), "it takes too long")
            self.uploader.failed.clear()
            raise StorageError(f"{self._unsent(left)}: {why}; the same command sends what is missing")
        self.remote.send_run_files(self.root, self.remote.patience())
        if self.uploader.waited >= 1.0:
            log.info(f"Training waited {self.uploader.waited:.0f} s for uploads")

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
