"""A run's checkpoints in an object store, `<url>/<step>/<file>`: sent, read back, fetched, looked for.

The manifest is the last object of a checkpoint: a step without one does not exist, and nothing is ever renamed. It is
written only when every other file has been read back and has the size and SHA-256 that the manifest says.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pentode import log
from pentode.checkpoint import storage
from pentode.checkpoint.ahead import ahead
from pentode.checkpoint.folder import (
    HF_FOLDERS,
    MANIFEST_LIMIT,
    Checkpoint,
    DamagedError,
    open_checkpoint,
    steps,
    with_manifest,
)
from pentode.checkpoint.keep import to_remove
from pentode.checkpoint.manifest import FILE_NAME, MANIFEST, STEP_NAME, FileFacts, Manifest, NewerFormatError
from pentode.checkpoint.objects import SECONDS, Found, Objects
from pentode.checkpoint.retry import Clock, Patience
from pentode.checkpoint.s3_errors import AbsentError
from pentode.config.places import problem_of
from pentode.errors import CheckpointError, StorageError

TRANSFERS = 8  # at a time, of all files
PARTS = 4  # of these, of one file
TRIES = 3  # to send a file, each time followed by reading it back
LEAVING = "leaving.json"  # in a step that is being removed
HF_CONFIG = "config.json"  # of a Hugging Face folder, which nobody loads without
LIMIT = 300.0  # seconds for which the calls of one piece of work may fail
RUN_FILES = ("metrics.jsonl", "report.html", "loss.png", "sample.txt")  # sent beside the checkpoints, for people


@dataclass(frozen=True)
class Entry:
    """A checkpoint in the store that has a manifest: what that says, its bytes, and when it was written."""

    manifest: Manifest
    data: bytes
    found: Found


class Remote:
    """The checkpoints under an address; all methods may be called from any thread, and raise StorageError."""

    def __init__(
        self,
        url: str,
        *,
        transfers: int | None = None,
        parts: int | None = None,
        limit: float | None = None,
        clock: Clock | None = None,
        seconds: float = SECONDS,
    ) -> None:
        transfers = transfers or TRANSFERS
        parts = min(parts or PARTS, transfers)
        self.url, self.clock = url.rstrip("/"), clock or Clock()
        self.limit = LIMIT if limit is None else limit
        self.files = max(1, transfers // parts)  # at a time
        self.objects = Objects(url, parts=parts, seconds=seconds)

    def patience(self, what: int | str = "") -> Patience:
        """For one piece of work about a step, or all."""
        return Patience(f"{self.url}/{what}".rstrip("/"), limit=self.limit, clock=self.clock)

    def prepare(self) -> None:
        """Drop what an interrupted upload left, and find out now whether the store can be read and written."""
        patience = self.patience()
        self.steps(patience)
        self.objects.check_writable(patience, MANIFEST)
        try:
            count = self.objects.abort_unfinished(patience, _is_ours)
        except StorageError as error:
            log.warning(f"{error}; unfinished uploads are not dropped: give the bucket a lifecycle rule for them")
            return
        if count:
            log.info(f"{self.url}: dropped {count} unfinished uploads of an interrupted run")

    def steps(self, patience: Patience) -> list[int]:
        """The steps of which something is there, the newest first; those without a manifest do not count as there."""
        names = self.objects.under(patience, deep=False)
        found = [name[:-1] for name in names if name[-1] == "/" and STEP_NAME.fullmatch(name[:-1])]
        return sorted(map(int, found), reverse=True)

    def entry(self, patience: Patience, step: int) -> Entry | None:
        """What the manifest of a step says; None where there is none. Raises CheckpointError, DamagedError."""
        name = f"{step}/{MANIFEST}"
        found = self.objects.find(patience, name)
        if found is None:
            return None
        where = f"{self.url}/{name}"
        if found.size > MANIFEST_LIMIT:
            raise DamagedError(f"{where}: it is larger than {MANIFEST_LIMIT:,} bytes")
        try:
            data = b"".join(self.objects.read(patience, name, found.size))
            manifest = Manifest.parse(data)
        except AbsentError:
            return None
        except NewerFormatError as error:
            raise CheckpointError(f"{where}: {error}; use the Pentode that wrote it, or a newer one") from error
        except ValueError as error:
            raise DamagedError(f"{where}: {error}") from error
        if manifest.step != step:
            raise DamagedError(f"{where}: it is that of step {manifest.step}")
        return Entry(manifest, data, found)

    def upload(self, folder: Path, patience: Patience, *, again: bool = True) -> bool:
        """Send a checkpoint, or what is missing of it, and its manifest when all of it was read back.

        One that the store has already is read back `again`, or else believed, and False returned. DamagedError where
        the local one is not what was saved: then it does not appear in the store.
        """
        local = with_manifest(folder)
        data, step = (folder / MANIFEST).read_bytes(), local.step
        there = self.objects.under(patience, f"{step}/")
        manifest = f"{step}/{MANIFEST}"
        published = manifest in there and self._is(patience, manifest, facts_of(data))
        if published and not again:
            return False
        if manifest in there and not published:
            log.warning(f"{self.url}/{step}: holds another checkpoint of this step, which is replaced")
            self.objects.remove(patience, [manifest])
        self._each(lambda name: self._send(patience, local, name, there), list(local.manifest.files))
        if published:
            return True
        listed = {f"{step}/{name}" for name in (*local.manifest.files, MANIFEST)}
        self.objects.remove(patience, sorted(name for name in there if name not in listed and _is_ours(name)))
        self._remove_hf(step, patience)  # of another checkpoint of this step
        self.objects.write(patience, manifest, data)
        if not self._is(patience, manifest, facts_of(data)):
            raise StorageError(f"{self.url}/{manifest}: what comes back is not what was sent; check the store")
        return True

    def fetch(self, step: int, root: Path, patience: Patience) -> Path | None:
        """Bring a checkpoint to `root`/<step>, every checksum compared; None where the store has none of that step.

        DamagedError where it is not what was saved. Another folder of that name is set aside.
        """
        entry = self.entry(patience, step)
        if entry is None:
            return None
        log.info(f"Downloading {self.url}/{step}")
        temporary, folder = root / f".tmp-{step}-{secrets.token_hex(4)}", root / str(step)
        needed = sum(facts.size for facts in entry.manifest.files.values())
        with storage.explained(root, needed=needed):
            storage.make_folder(temporary)
            try:
                self._each(
                    lambda name: self._fetch_file(patience, entry.manifest, name, temporary), list(entry.manifest.files)
                )
                storage.write(temporary / MANIFEST, [entry.data])
                storage.sync_folder(temporary)
                if folder.exists():
                    storage.rename(folder, root / f".bad-{step}-{secrets.token_hex(4)}")
                storage.rename(temporary, folder)
            except BaseException:
                with suppress(OSError):
                    storage.remove(temporary)
                raise
        return folder

    def damages(
        self, step: int, manifest: Manifest, patience: Patience, *, checksums: bool = True
    ) -> Iterator[DamagedError]:
        """Read each file of a checkpoint and compare it, or only their sizes; what is wrong, one for each file."""
        for name, facts in manifest.files.items():
            try:
                (self._prove if checksums else self._check_size)(patience, f"{step}/{name}", facts)
            except DamagedError as error:
                yield error

    def set_aside(self, step: int, patience: Patience) -> None:
        """Make a damaged checkpoint invisible; its files stay, and the manifest under another name."""
        name = f"{step}/{MANIFEST}"
        found = self.objects.find(patience, name)
        if found is not None:
            data = b"".join(self.objects.read(patience, name, min(found.size, MANIFEST_LIMIT)))
            self.objects.write(patience, f"{step}/bad-{secrets.token_hex(4)}-{MANIFEST}", data)
            self.objects.remove(patience, [name])
            self._remove_hf(step, patience)

    def prune(self, patience: Patience, *, keep_last: int, keep_every: int | None) -> set[int]:
        """Remove checkpoints that need not stay, and return their steps; a manifest says that one was read back.

        What goes is marked first, by an object that goes last, so that a prune which is broken off is finished later.
        """
        names = self.objects.under(patience)
        steps_of = {name: step for name in names if (step := _step_of(name)) is not None}
        complete = {step for name, step in steps_of.items() if name == f"{step}/{MANIFEST}"}
        begun = {step for name, step in steps_of.items() if name == f"{step}/{LEAVING}"} - complete
        going = begun | set(to_remove(sorted(complete), keep_last=keep_last, keep_every=keep_every))
        for step in sorted(going):
            mark = f"{step}/{LEAVING}"
            self.objects.write(patience, mark, b"{}")
            self._remove(patience, [name for name, of in steps_of.items() if of == step and name != mark])
            self.objects.remove(patience, [mark])
        return going

    def remove_run(self) -> None:
        """Remove all checkpoints and what is sent beside them, and nothing of anybody else."""
        patience = self.patience()
        ours = list(filter(_is_ours, self.objects.under(patience)))
        self._remove(patience, [*ours, *RUN_FILES] if ours else [])

    def fetch_run_file(self, name: str, root: Path, patience: Patience) -> None:
        """Bring back what `send_run_files` sent, where the store has it and `root` has not."""
        found = None if (root / name).exists() else self.objects.find(patience, name)
        if found is not None:
            with storage.explained(root, needed=found.size):
                temporary = root / f".tmp-metrics-{secrets.token_hex(4)}"
                storage.write(temporary, self.objects.read(patience, name, found.size))
                storage.rename(temporary, root / name)

    def has(self, step: int, patience: Patience) -> bool:
        """Whether a checkpoint is here."""
        return self.objects.find(patience, f"{step}/{MANIFEST}") is not None

    def has_hf(self, step: int, patience: Patience) -> bool:
        """Whether a checkpoint's Hugging Face folder is here; its config.json is the last object."""
        return self.objects.find(patience, f"{HF_FOLDERS}/{step}/{HF_CONFIG}") is not None

    def send_hf(self, folder: Path, patience: Patience) -> None:
        """Send a checkpoint's Hugging Face folder, and read it back."""
        paths = sorted(folder.iterdir(), key=lambda path: path.name == HF_CONFIG)
        for path in paths:
            self._send_until_right(patience, f"{HF_FOLDERS}/{folder.name}/{path.name}", path, storage.hash_file(path))

    def send_run_files(self, root: Path, patience: Patience) -> None:
        """Send the run's records and report as they are now; people read them, Pentode does not."""
        for name in RUN_FILES:
            if (root / name).is_file():
                self.objects.write_file(patience, name, root / name)

    def _send(self, patience: Patience, local: Checkpoint, name: str, there: dict[str, Found | None]) -> None:
        """Have a file in the store as the manifest says; one that is there already and right is not sent again."""
        facts, key = local.manifest.files[name], f"{local.step}/{name}"
        if key not in there or not self._is(patience, key, facts):
            self._send_until_right(patience, key, local.folder / name, facts, otherwise=lambda: local.prove(name))

    def _send_until_right(
        self, patience: Patience, key: str, path: Path, facts: FileFacts, *, otherwise: Callable[[], object] = bool
    ) -> None:
        """Send a file until what is read back is right; `otherwise` is called after each time that it is not."""
        for _ in range(TRIES):
            with suppress(AbsentError):  # somebody dropped the upload meanwhile
                self.objects.write_file(patience, key, path)
            if self._is(patience, key, facts):
                return
            otherwise()
        raise StorageError(f"{self.url}/{key}: sent {TRIES} times, what comes back is not that; check the store")

    def _remove(self, patience: Patience, names: Sequence[str]) -> None:
        """Remove objects, first those without which nobody takes the others for a checkpoint or a model."""
        first = [name for name in names if name.endswith((f"/{MANIFEST}", f"/{HF_CONFIG}"))]
        self.objects.remove(patience, first)
        self.objects.remove(patience, [name for name in names if name not in set(first)])

    def _remove_hf(self, step: int, patience: Patience) -> None:
        self._remove(patience, list(filter(_is_ours, self.objects.under(patience, f"{HF_FOLDERS}/{step}/"))))

    def _fetch_file(self, patience: Patience, manifest: Manifest, name: str, folder: Path) -> None:
        """Write a file that the store has; a second time if the first is not what the manifest says."""
        facts, key = manifest.files[name], f"{manifest.step}/{name}"
        self._check_size(patience, key, facts)
        for last in (False, True):
            try:
                found = storage.write(folder / name, self.objects.read(patience, key, facts.size))
            except AbsentError as error:
                raise DamagedError(f"{self.url}/{key}: it is not there") from error
            if found == facts:
                return
            if last:
                raise DamagedError(f"{self.url}/{key}: it is damaged, its checksum is wrong")
            storage.remove(folder / name)

    def _is(self, patience: Patience, key: str, facts: FileFacts) -> bool:
        try:
            self._prove(patience, key, facts)
        except DamagedError:
            return False
        return True

    def _prove(self, patience: Patience, key: str, facts: FileFacts) -> None:
        """Download an object and compare its size and SHA-256; raises DamagedError."""
        self._check_size(patience, key, facts)
        hasher = sha256()
        try:
            for piece in self.objects.read(patience, key, facts.size):
                hasher.update(piece)
        except AbsentError as error:
            raise DamagedError(f"{self.url}/{key}: it is not there") from error
        if hasher.hexdigest() != facts.sha256:
            raise DamagedError(f"{self.url}/{key}: it is damaged, its checksum is wrong")

    def _check_size(self, patience: Patience, key: str, facts: FileFacts) -> None:
        found = self.objects.find(patience, key)
        if found is None:
            raise DamagedError(f"{self.url}/{key}: it is not there")
        if found.size != facts.size:
            raise DamagedError(f"{self.url}/{key}: it has {found.size:,} bytes, not {facts.size:,}")

    def _each(self, work: Callable[[str], None], names: Sequence[str]) -> None:
        """Do the work for each file, several at a time."""
        for _ in ahead(work, names, workers=min(self.files, len(names))):
            pass


def locate(url: str, *, limit: float | None = None) -> tuple[Remote, int | None]:
    """The run that an address is in, and the step if it names one that is there: s3://bucket/run, or .../run/1200."""
    above, _, last = url.rstrip("/").rpartition("/")
    if STEP_NAME.fullmatch(last) and problem_of(above) is None:
        run = Remote(above, limit=limit)
        if run.objects.find(run.patience(last), f"{last}/{MANIFEST}") is not None:
            return run, int(last)
    return Remote(url, limit=limit), None


def bring_newest(root: Path, remote: Remote, *, quarantine: bool = True, fallback: bool = True) -> int | None:
    """See to it that the newest good checkpoint, of those in `root` and those in the store, is in `root`.

    Returns its step if it came from the store. Of a step that both have, the local one is taken if it is whole. Newer
    ones that are damaged get a line and, with `quarantine`, are set aside on both sides. Damaged ones and no good one
    is a CheckpointError, and without `fallback` so is an older one; then nothing is set aside.
    """
    damaged: list[tuple[DamagedError, int, Callable[[], object]]] = []
    patience = remote.patience()
    for step in sorted({*(int(path.name) for path in steps(root)), *remote.steps(patience)}, reverse=True):
        for number, (is_there, set_aside) in enumerate(_sources(root, step, remote, patience)):
            try:
                if not is_there():
                    continue
            except DamagedError as error:
                damaged.append((error, step, set_aside))
                continue
            if not fallback and any(bad != step for _, bad, _ in damaged):
                raise CheckpointError(
                    f"{damaged[0][0].what}; restore it from a copy, or set checkpoints.on_corrupt (it is stop)"
                )
            for error, bad, aside in damaged:
                log.warning(f"{error.what}; going on from step {step}")
                if quarantine and bad != step:  # else the good one has taken its place already
                    aside()
            return step if number else None
    if damaged:
        raise CheckpointError(f"{damaged[0][0]}; no older checkpoint in {root} or {remote.url} is whole")
    return None


def _sources(
    root: Path, step: int, remote: Remote, patience: Patience
) -> Iterator[tuple[Callable[[], bool], Callable[[], object]]]:
    """Where a step may be: for each place, what reads all of it, and what sets it aside if it is damaged."""
    folder = root / str(step)

    def local() -> bool:
        if folder.is_dir():
            open_checkpoint(folder).verify()
            return True
        return False

    yield local, lambda: storage.rename(folder, root / f".bad-{step}-{secrets.token_hex(4)}")
    yield lambda: remote.fetch(step, root, patience) is not None, lambda: remote.set_aside(step, patience)


def _is_ours(name: str) -> bool:
    """Whether an object's name is one that a run gives: that of a step's file, or the manifest that `prepare` tries."""
    return name == MANIFEST or _step_of(name) is not None


def _step_of(name: str) -> int | None:
    """The step that an object is of, by its name: <step>/<file> or hf/<step>/<file>; None where it is of none."""
    step, _, file = name.removeprefix(f"{HF_FOLDERS}/").rpartition("/")
    return int(step) if STEP_NAME.fullmatch(step) and FILE_NAME.fullmatch(file) else None


def facts_of(data: bytes) -> FileFacts:
    """Size and SHA-256 of bytes."""
    return FileFacts(len(data), sha256(data).hexdigest())
