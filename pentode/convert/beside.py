"""Hugging Face folders beside a run's checkpoints, written by a process of its own while training goes on.

`<run>/hf/<step>` is made of the published files of checkpoint `<step>`, so that no step waits for it. It appears when
it is whole; what cannot be written is a line in the log and never ends the run.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from pentode import log
from pentode.checkpoint import storage
from pentode.checkpoint.folder import HF_FOLDERS, steps
from pentode.checkpoint.manifest import MANIFEST

REFUSED = 60.0  # seconds that the disk refuses, after which nobody waits for a folder any more
NICE = 19  # the lowest priority: whatever the training leaves
CONVERT = [sys.executable, "-m", "pentode", "convert"]
SOURCE = Path(__file__).parents[2]  # where this package is, for the process that is started
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class HFFolders:
    """Keeps `root`/hf up to date while it is entered; leaving it waits for what is missing, or gives up on an error.

    A folder goes when the run has removed its checkpoint.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._seen: set[str] = set()
        self._failed: set[str] = set()
        self._stale: set[str] = set()  # steps that were saved anew
        self._child: tuple[str, subprocess.Popen[bytes], IO[bytes]] | None = None
        self._one_at_a_time = threading.Lock()  # a save may end in a thread of its own
        self._left = False
        self._refused_since: float | None = None  # by the disk, each time that it was tried

    def __enter__(self) -> "HFFolders":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if value is None:
                self.finish()
        finally:
            self._give_up()

    def wake(self, root: Path) -> None:
        """Look which checkpoints are in `root`, and begin with what is missing; returns at once. From any thread."""
        self.root = root
        with self._one_at_a_time:
            self._try_to_look()

    def renew(self, checkpoint: Path) -> None:
        """`wake` for a checkpoint that was just saved: a folder that its step has is another's."""
        self.root = checkpoint.parent
        with self._one_at_a_time:
            self._stale.add(checkpoint.name)
            self._failed.discard(checkpoint.name)
            self._try_to_look()

    @property
    def idle(self) -> bool:
        """Whether nothing is being written."""
        return self._child is None

    def is_to_come(self, step: int) -> bool:
        """Whether a checkpoint's folder is missing and will be made, so that its files are needed. From any thread."""
        with self._one_at_a_time:
            self._try_to_look()
            refused = self._refused_since is not None and time.monotonic() > self._refused_since + REFUSED
            is_there = (self.root / str(step) / MANIFEST).exists()
            return is_there and not refused and str(step) not in self._failed and not self._is_made(str(step))

    def finish(self) -> None:
        """Return when every checkpoint has its folder, or has failed to get one."""
        self.wake(self.root)
        while (child := self._child) is not None:  # which another thread may collect
            step, process, _ = child
            log.info(f"Waiting for {self.root / HF_FOLDERS / step}")
            process.wait()
            self.wake(self.root)

    def _try_to_look(self) -> None:
        """`_look`, unless this was left: a save may end late."""
        if self._left:
            return
        try:
            self._look()
            self._refused_since = None
        except OSError as error:
            self._refused_since = self._refused_since or time.monotonic()
            log.once(f"{self.root / HF_FOLDERS}: cannot be written, training goes on ({error})", key="no hf folder")

    def _is_made(self, step: str) -> bool:
        return step not in self._stale and (self.root / HF_FOLDERS / step).exists()

    def _look(self) -> None:
        if self._child is not None and self._child[1].poll() is None:
            return
        self._collect()
        there = [folder.name for folder in steps(self.root) if (folder / MANIFEST).exists()]
        folder = self.root / HF_FOLDERS
        for step in (*self._stale, *self._seen.difference(there)):
            with suppress(FileNotFoundError):  # who sends it may remove it
                storage.remove(folder / step)
            self._stale.discard(step)
        self._seen |= set(there)
        for leftover in folder.glob(".tmp-*"):  # of a process that was killed
            storage.remove(leftover)
        missing = [step for step in there if not (folder / step).exists() and step not in self._failed]
        if missing:
            self._start(missing[0])

    def _start(self, step: str) -> None:
        """Begin to convert a checkpoint, in a process that has no GPU and no part in the run's world."""
        storage.make_folder(self.root / HF_FOLDERS)
        environment = {name: text for name, text in os.environ.items() if name not in OF_RANKS}
        paths = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
        source, target = (str(path.absolute()) for path in (self.root / step, self.root / HF_FOLDERS / step))
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the process has ended); a pipe could fill up
        process = subprocess.Popen(
            [*CONVERT, source, target, "--from", "pentode", "--to", "hf"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,  # Ctrl-C is for the run
        )
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, NICE)
        self._child = step, process, errors

    def _collect(self) -> None:
        """Take note of what became of the process that has ended."""
        if self._child is None:
            return
        (step, process, errors), self._child = self._child, None
        with errors:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
        if process.returncode and (self.root / step).exists():  # else it was pruned meanwhile
            self._failed.add(step)
            why = said[-1] if said else f"exit code {process.returncode}"
            log.warning(f"{self.root / HF_FOLDERS / step}: could not be written, training goes on ({why})")

    def _give_up(self) -> None:
        """End the process, if there is one, and remove what it began; no other is started."""
        with self._one_at_a_time:
            self._left = True
        if self._child is None:
            return
        _, process, errors = self._child
        self._child = None
        process.kill()
        process.wait()
        errors.close()
        for leftover in (self.root / HF_FOLDERS).glob(".tmp-*"):
            with suppress(OSError):
                storage.remove(leftover)
