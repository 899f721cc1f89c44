"""Checkpoints on their way to an object store: a queue with few places, and a thread that works it off.

A checkpoint waits as its own local folder, so a place in the queue costs no memory, and what a killed run left unsent
is found by the next one.
"""

import secrets
import threading
from collections.abc import Callable
from pathlib import Path

from pentode import log
from pentode.checkpoint import storage
from pentode.checkpoint.folder import HF_FOLDERS, steps
from pentode.checkpoint.remote import Remote
from pentode.checkpoint.retry import GivenUpError, Patience
from pentode.errors import PentodeError

PLACES = 2  # checkpoints that may wait while another is sent
TICK = 0.5  # seconds between looks at whether a Hugging Face folder is there
FAREWELL = 5.0  # seconds for the thread to drop an upload in parts
AFTER_FAILURE = 0.0  # seconds of patience with a store that could not take the last checkpoint: one try


class Uploader:
    """Sends each checkpoint of `root` that the store lacks, the oldest first, until it is closed.

    remove      remove a local checkpoint once the store's was read back and is right
    fetched     the step of a local checkpoint that has just come from the store, and need not be read back
    hf_to_come  whether a step's Hugging Face folder is still to be made of the local checkpoint; it is then sent too
    sent        called when all of a step is in the store: older ones may go
    """

    def __init__(
        self,
        remote: Remote,
        root: Path,
        *,
        remove: bool,
        fetched: int | None = None,
        places: int = PLACES,
        hf_to_come: Callable[[int], bool] | None = None,
        sent: Callable[[int, Patience], object] | None = None,
    ) -> None:
        self.remote, self.root, self.remove, self.fetched = remote, root, remove, fetched
        self.places, self.hf_to_come, self.sent = places, hf_to_come, sent
        self.failed: dict[int, str] = {}  # why, by step
        self._waiting: list[int] = []
        self._sending: int | None = None
        self._done: set[int] = set()
        self._patience: Patience | None = None
        self._impatient = self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="s3-upload", daemon=True)
        self._thread.start()

    def collect(self) -> None:
        """Queue what `root` holds and the store lacks: what was saved since, or a former process left unsent."""
        with self._changed:
            self._collect()

    def has_place(self, *, within: float = 0.0) -> bool:
        """Whether no more than `places` wait for the one being sent when one more comes, or so within some seconds."""
        with self._changed:
            return self._changed.wait_for(self._has_place, timeout=within)

    def try_all_again(self) -> None:
        """Queue also what failed, for the last time, with all patience."""
        with self._changed:
            self._impatient = False
            self._collect()

    def wait(self, seconds: float) -> bool:
        """Wait until all is sent, or what cannot be sent has failed; whether it came so far within `seconds`."""
        with self._changed:
            return self._changed.wait_for(self._is_idle, timeout=seconds)

    def close(self) -> None:
        """End the thread: what is under way is given up when its request ends; the local folder stays."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            if self._patience is not None:
                self._patience.stop.set()
            self._changed.notify_all()
        self._thread.join(FAREWELL)

    def unsent(self) -> list[int]:
        """The steps that are here and not yet in the store."""
        with self._changed:
            sending = [] if self._sending is None else [self._sending]
            return sorted({*self._waiting, *sending, *self.failed})

    def _collect(self) -> None:
        known = {*self._waiting, *self._done, self._sending}
        self._waiting = sorted({*self._waiting, *({int(path.name) for path in steps(self.root)} - known)})
        self._changed.notify_all()

    def _has_place(self) -> bool:
        return len(self._waiting) + (self._sending is not None) <= self.places

    def _is_idle(self) -> bool:
        return not self._waiting and self._sending is None

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                step = self._sending = self._waiting.pop(0)
                self._patience = self.remote.patience(step)
                if self._impatient:
                    self._patience.limit = AFTER_FAILURE
            problem = self._problem_of_sending(step, self._patience)
            with self._changed:
                self._sending, self._impatient = None, problem is not None
                self.failed.pop(step, None)
                if problem is None:
                    self._done.add(step)
                else:
                    self.failed[step] = problem
                self._changed.notify_all()

    def _problem_of_sending(self, step: int, patience: Patience) -> str | None:
        """Send a checkpoint; why it could not be sent, if so. Nothing here may end a training run."""
        folder, began = self.root / str(step), self.remote.clock.now()
        try:
            if step != self.fetched and self.remote.upload(folder, patience, again=self.remove):
                log.info(f"Uploaded checkpoint {step} to {patience.what} ({self.remote.clock.now() - began:.1f} s)")
            if self.hf_to_come is not None:
                self._send_hf(step, patience, self.hf_to_come)
            if self.remove:
                self._remove(folder)
        except Exception as error:  # noqa: BLE001
            if not folder.exists():  # pruned while it waited, which is no problem
                return None
            problem = str(error) if isinstance(error, (PentodeError, OSError)) else f"{type(error).__name__}: {error}"
            if not self._closed:
                log.warning(f"{problem}; checkpoint {step} is not in the store yet and stays in {self.root}")
            return problem
        self._follow(step, patience)
        return None

    def _send_hf(self, step: int, patience: Patience, to_come: Callable[[int], bool]) -> None:
        """Send a step's Hugging Face folder, when it is there; not one that is in the store already."""
        if self.remote.has_hf(step, patience):
            return
        while to_come(step) and not self._closed:
            with self._changed:
                self._changed.wait(TICK)
        if self._closed:
            raise GivenUpError("the run ends")
        folder = self.root / HF_FOLDERS / str(step)
        if folder.is_dir():  # else it could not be made
            self.remote.send_hf(folder, patience)

    def _follow(self, step: int, patience: Patience) -> None:
        """What follows when a step is in the store: the records are sent, older ones removed; errors are told."""
        try:
            self.remote.send_run_files(self.root, patience)
        except (PentodeError, OSError) as error:
            if not self._closed:
                log.once(f"{error}; the report in the store is not the newest", key="run files")
        try:
            if self.sent is not None and not self._closed:
                self.sent(step, patience)
        except (PentodeError, OSError) as error:
            if not self._closed:
                log.warning(f"{error}; older checkpoints could not be removed")

    def _remove(self, folder: Path) -> None:
        with storage.explained(self.root):
            trash = folder.with_name(f".trash-{folder.name}-{secrets.token_hex(4)}")
            storage.rename(folder, trash)
            storage.remove(trash)
