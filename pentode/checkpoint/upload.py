"""Checkpoints on their way to an object store: a queue with few places, and a thread that works it off.

A checkpoint waits as its own local folder, so a place in the queue costs no memory, and what a killed run left unsent
is found by the next one.
"""

import secrets
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from pentode import log
from pentode.checkpoint import storage
from pentode.checkpoint.folder import HF_FOLDERS, steps
from pentode.checkpoint.remote import Remote
from pentode.checkpoint.retry import Patience
from pentode.errors import in_words

PLACES = 2  # checkpoints that may wait while another is sent
FOLDERS = 4  # checkpoints in the store that may stay here until their Hugging Face folders are there, too
TICK = 0.5  # seconds between looks at whether a Hugging Face folder is there
FAREWELL = 5.0  # seconds for the thread to drop an upload in parts
AFTER_FAILURE = 0.0  # seconds of patience with a store that could not take the last checkpoint: one try


def most_waiting(*, folders: bool) -> int:
    """How many checkpoints that are sent and removed may be here when another is saved, as `has_place` allows it.

    folders  some stay until their Hugging Face folders are in the store, too
    """
    return PLACES + (FOLDERS if folders else 0)


class Uploader:
    """Sends each checkpoint of `root` that the store lacks, the oldest first, until it is closed.

    remove      remove a local checkpoint once the store's was read back and is right
    fetched     the step of a local checkpoint that has just come from the store, and need not be read back
    hf_to_come  whether a step's Hugging Face folder is still to be made of the local checkpoint, which stays until that
                is in the store, too; checkpoints go first
    sent        called when a step is in the store: older ones may go; returns those that went from there
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
        sent: Callable[[int, Patience], Collection[int]] | None = None,
    ) -> None:
        self.remote, self.root, self.remove, self.fetched = remote, root, remove, fetched
        self.places, self.hf_to_come, self.sent = places, hf_to_come, sent
        self.failed: dict[int, str] = {}  # why, by step
        self._waiting: list[int] = []
        self._sending: int | None = None
        self._done: set[int] = set()
        self._folders: list[int] = []  # steps in the store whose Hugging Face folders are not
        self._failed_folders: list[int] = []  # and could not be sent when it was tried
        self._tidying = False  # older ones are being removed after a folder was sent
        self._final = False  # no other checkpoint comes
        self._patience: Patience | None = None
        self._impatient = self._closed = False
        self._changed = threading.Condition()  # its lock may be taken again by who holds it
        self._thread = threading.Thread(target=self._work, name="s3-upload", daemon=True)
        self._thread.start()

    def collect(self) -> None:
        """Queue what `root` holds and the store lacks: what was saved since, or a former process left unsent."""
        with self._changed:
            self._collect()

    def has_place(self, *, within: float = 0.0) -> bool:
        """Whether there is room for one more, or comes to be within so many seconds.

        No more than `places` wait behind the one being sent; and where local copies are removed, few stay for folders.
        """
        with self._changed:
            return self._changed.wait_for(self._has_place, timeout=within)

    def try_all_again(self) -> None:
        """Queue also what failed, for the last time, with all patience."""
        with self._changed:
            self._final, self._impatient = True, False
            if self._patience is not None:
                self._patience.limit = self.remote.limit  # of what is under way
            self._try_folders_again()
            self._collect()

    def wait(self, seconds: float, *, folders: bool = False) -> bool:
        """Wait until all checkpoints are sent, or what cannot be sent has failed; whether it came so far in `seconds`.

        `folders`: Hugging Face folders, too.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._is_idle(folders=folders), timeout=seconds)

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
            sending = [step for step in [self._sending] if step is not None and step not in self._done]
            return sorted({*self._waiting, *sending, *self.failed})

    def needed(self) -> list[int]:
        """The steps that must stay here: those not in the store, or whose Hugging Face folder is not."""
        with self._changed:
            return sorted({*self.unsent(), *self._folders, *self._failed_folders})

    def newest_sent(self) -> int | None:
        """The newest step that is here, or was, and in the store."""
        with self._changed:
            return max(self._done, default=None)

    def _collect(self) -> None:
        known = {*self._waiting, *self._done, self._sending}
        self._waiting = sorted({*self._waiting, *({int(path.name) for path in steps(self.root)} - known)})
        self._changed.notify_all()

    def _has_place(self) -> bool:
        stay = len(self._folders) + len(self._failed_folders) if self.remove else 0  # on a disk that is no archive
        return len(self._waiting) + (self._sending is not None) <= self.places and stay <= FOLDERS

    def _is_idle(self, *, folders: bool) -> bool:
        under_way = self._folders or self._tidying
        return not self._waiting and self._sending is None and not (folders and under_way)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._folders or self._closed)
                if self._closed:
                    return
                step = self._sending = self._waiting.pop(0) if self._waiting else None
            if step is None:  # folders are made by the way, and checkpoints do not wait for them
                self._send_a_folder()
            else:
                self._send_a_checkpoint(step)

    def _send_a_checkpoint(self, step: int) -> None:
        patience = self._patience_for(step)
        problem = self._problem_of_sending(step, patience)
        with self._changed:
            self.failed.pop(step, None)
            if problem is None:
                self._done.add(step)
                self._try_folders_again()
            else:
                self.failed[step] = problem
        if problem is None:
            self._let_go(step, patience)
            self._follow(step, patience)
        with self._changed:
            self._sending, self._impatient = None, problem is not None and not self._final
            self._changed.notify_all()

    def _problem_of_sending(self, step: int, patience: Patience) -> str | None:
        """Send a checkpoint; why it could not be sent, if so. Nothing here may end a training run."""
        folder, began = self.root / str(step), self.remote.clock.now()
        try:
            if step != self.fetched and self.remote.upload(folder, patience, again=self.remove):
                log.info(f"Uploaded checkpoint {step} to {patience.what} ({self.remote.clock.now() - began:.1f} s)")
        except Exception as error:  # noqa: BLE001
            if not folder.exists():  # pruned while it waited, which is no problem
                return None
            problem = in_words(error)
            if not self._closed:
                log.warning(f"{problem}; checkpoint {step} is not in the store yet and stays in {self.root}")
            return problem
        return None

    def _let_go(self, step: int, patience: Patience) -> None:
        """Remove the local copy of a step that is in the store, or keep it until its Hugging Face folder is."""
        try:
            if self.hf_to_come is not None and not self.remote.has_hf(step, patience):
                with self._changed:
                    self._folders.append(step)
            elif self.remove:
                self._remove(step)
        except Exception as error:  # noqa: BLE001
            if not self._closed:
                log.warning(f"{in_words(error)}; {self.root / str(step)} stays until the next start")

    def _follow(self, step: int, patience: Patience) -> None:
        """What follows when a step is in the store: the records are sent, older ones removed; errors are told."""
        try:
            self.remote.send_run_files(self.root, patience)
        except Exception as error:  # noqa: BLE001
            if not self._closed:
                log.once(f"{in_words(error)}; the report in the store is not the newest", key="run files")
        self._prune(step, patience)

    def _prune(self, step: int, patience: Patience) -> None:
        """Have older checkpoints removed; of those that went from the store nothing is needed here."""
        try:
            if self.sent is not None and not self._closed:
                gone = self.sent(step, patience)
                with self._changed:
                    pruned = [step for step in (*self._folders, *self._failed_folders) if step in gone]
                    self._folders = [step for step in self._folders if step not in gone]
                    self._failed_folders = [step for step in self._failed_folders if step not in gone]
                for step in pruned:
                    self._remove(step)
        except Exception as error:  # noqa: BLE001
            if not self._closed:
                log.warning(f"{in_words(error)}; older checkpoints could not be removed")

    def _send_a_folder(self) -> None:
        """Send the Hugging Face folder of a step whose is made by now; or wait a moment for that, or a checkpoint."""
        step = next((step for step in self._folders if not self._is_to_come(step)), None)
        if step is None:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed, timeout=TICK)
            return
        patience, folder = self._patience_for(step), self.root / HF_FOLDERS / str(step)
        sent = False
        try:
            if folder.is_dir() and self.remote.has(step, patience):  # it could be made, and its step was not pruned
                self.remote.send_hf(folder, patience)
            sent = True
            if self.remove:
                self._remove(step)
        except Exception as error:  # noqa: BLE001
            if not self._closed:
                log.warning(f"{in_words(error)}; {folder} {'stays' if sent else 'is not in the store yet'}")
        with self._changed:
            self._tidying = True
            self._folders.remove(step)
            if not sent:
                self._failed_folders.append(step)
        if sent:
            self._prune(step, patience)
        with self._changed:
            self._tidying = False
            self._changed.notify_all()

    def _is_to_come(self, step: int) -> bool:
        assert self.hf_to_come is not None, "nobody makes Hugging Face folders"
        try:
            return self.hf_to_come(step)
        except Exception as error:  # noqa: BLE001
            log.once(f"{in_words(error)}; Hugging Face folders may not be made", key="hf to come")
            return False

    def _try_folders_again(self) -> None:
        self._folders += self._failed_folders
        self._failed_folders = []

    def _patience_for(self, step: int) -> Patience:
        with self._changed:
            self._patience = patience = self.remote.patience(step)
            if self._impatient:
                patience.limit = AFTER_FAILURE
            if self._closed:  # meanwhile
                patience.stop.set()
            return patience

    def _remove(self, step: int) -> None:
        """Remove what is here of a step."""
        with storage.explained(self.root):
            for folder, name in ((self.root / str(step), f"{step}"), (self.root / HF_FOLDERS / str(step), f"hf{step}")):
                if folder.is_dir():
                    trash = self.root / f".trash-{name}-{secrets.token_hex(4)}"
                    storage.rename(folder, trash)
                    storage.remove(trash)
