"""What `pentode checkpoint` tells of checkpoints in an object store. No torch is needed."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pentode import log
from pentode.checkpoint import storage, survey
from pentode.checkpoint.folder import HEADER_LIMIT, TENSOR_FILE, DamagedError
from pentode.checkpoint.manifest import MANIFEST
from pentode.checkpoint.remote import Entry, Remote, locate
from pentode.checkpoint.retry import Patience
from pentode.checkpoint.s3_errors import AbsentError
from pentode.checkpoint.survey import Found
from pentode.config.places import problem_of
from pentode.errors import CheckpointError, ConfigError

LIMIT = 30.0  # seconds of failing calls: somebody waits


def found_in(url: str, *, checksums: bool = True) -> Iterator[Found]:
    """Each checkpoint of a run in a store, the oldest first; with `checksums` all of it is downloaded and compared."""
    remote = _remote(url)
    patience = remote.patience()
    steps = sorted(remote.steps(patience))
    if not steps:
        raise CheckpointError(f"{url}: holds no checkpoint; give a run's address")
    for step in steps:
        names = remote.objects.under(patience, f"{step}/")
        kept = [found for found in names.values() if found is not None]
        when = _when(max(found.modified for found in kept))
        status, layout, wrong = "unfinished", None, []
        if f"{step}/{MANIFEST}" in names:
            wrong = [survey.told(error) for error in _damages(remote, step, patience, checksums=checksums)]
            status = "damaged" if wrong else "good" if checksums else "complete"
            when, layout = _when_and_layout(remote, step, patience, when) if not wrong else (when, None)
        elif any(name.endswith(f"-{MANIFEST}") for name in names):
            status = "quarantined"
        yield Found(str(step), step, sum(found.size for found in kept), when, layout, status, wrong)


def verify(url: str) -> Iterator[str]:
    """Download a checkpoint, or all of a run, and compare: a line for each damage, or one that says it is good.

    Raises CheckpointError at the end if anything is damaged.
    """
    remote, only = _place(url)
    patience = remote.patience()
    steps = sorted(remote.steps(patience)) if only is None else [only]
    there = [step for step in steps if remote.objects.find(patience, f"{step}/{MANIFEST}") is not None]
    if not there:
        raise CheckpointError(f"{url}: holds no checkpoint; give the address of a checkpoint, or of a run")
    bad = 0
    for step in there:
        found = list(_damages(remote, step, patience, checksums=True))
        bad += bool(found)
        yield from (log.printable(survey.told(error)) for error in found)
        if not found:
            yield log.printable(f"{remote.url}/{step}: good")
    if bad:
        raise CheckpointError(f"{url}: {bad} of {len(there)} checkpoints damaged; restore from a copy, or use another")


def contents(url: str) -> dict[str, Any]:
    """What a checkpoint holds, by its own address or a run's: its newest. Of tensor files only the headers are read."""
    remote, step = _place(url)
    patience = remote.patience()
    for one in remote.steps(patience) if step is None else [step]:
        entry = remote.entry(patience, one)
        if entry is not None:
            with _outline(remote, entry, patience) as folder:
                facts = survey.contents(folder)
            return facts | {"checkpoint": f"{remote.url}/{one}", "when": _when(entry.found.modified)}
    raise CheckpointError(f"{url}: holds no checkpoint; give the address of a checkpoint, or of a run")


def _remote(url: str) -> Remote:
    problem = problem_of(url)
    if problem is not None:
        raise ConfigError([f"command line: {problem}"])
    return Remote(url, limit=LIMIT)


def _place(url: str) -> tuple[Remote, int | None]:
    """The run, and the step if the address names one."""
    _remote(url)
    return locate(url, limit=LIMIT)


def _damages(remote: Remote, step: int, patience: Patience, *, checksums: bool) -> Iterator[CheckpointError]:
    try:
        entry = remote.entry(patience, step)
        if entry is not None:
            yield from remote.damages(step, entry.manifest, patience, checksums=checksums)
    except CheckpointError as error:
        yield error


def _when_and_layout(remote: Remote, step: int, patience: Patience, when: str) -> tuple[str, dict[str, int] | None]:
    entry = remote.entry(patience, step)
    if entry is None:
        return when, None
    with _outline(remote, entry, patience, tensors=False) as folder:
        return _when(entry.found.modified), survey.layout_of(survey.config_of(folder))


@contextmanager
def _outline(remote: Remote, entry: Entry, patience: Patience, *, tensors: bool = True) -> Iterator[Path]:
    """A folder with a checkpoint's small files, and of the tensor files the headers: the rest of them are holes."""
    step = entry.manifest.step
    with tempfile.TemporaryDirectory(prefix="pentode-") as temporary:
        folder = Path(temporary) / str(step)
        folder.mkdir()
        storage.write(folder / MANIFEST, [entry.data])
        for name, facts in entry.manifest.files.items():
            key, is_tensors = f"{step}/{name}", TENSOR_FILE.fullmatch(name) is not None
            if is_tensors and not tensors:
                continue
            try:
                wanted = facts.size
                if is_tensors:
                    length = int.from_bytes(b"".join(remote.objects.read(patience, key, min(8, facts.size))), "little")
                    wanted = min(facts.size, 8 + min(length, HEADER_LIMIT))
                storage.write(folder / name, remote.objects.read(patience, key, wanted))
            except AbsentError as error:
                raise DamagedError(f"{remote.url}/{key}: it is not there, or too short") from error
            with (folder / name).open("r+b") as file:
                file.truncate(facts.size)
        yield folder


def _when(modified: datetime) -> str:
    return modified.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
