"""What power losses are drawn on is what the system sees: a run's recording beside strace's, and its order of syncs."""

from pathlib import Path
from random import Random

from benchmarks.reliability import power_loss, strace, tiny_run
from benchmarks.reliability.campaign import Campaign, Outcome
from benchmarks.reliability.disk import Event
from pentode.checkpoint.manifest import HIDDEN_NAME, STEP_NAME

STEPS = 9
AS_RECORDED = {"mkdir": "mkdir", "write": "write", "fsync": "fsync", "rename": "rename", "unlink": "remove"}
AS_RECORDED |= {"rmdir": "remove"}


def prepare(prepared: Path) -> None:
    """Record a run in both ways at once."""
    config = tiny_run.write_config(prepared / "text", steps=STEPS)
    power_loss.record_run(config, prepared, attach=lambda pids: strace.watch(pids, prepared))


def case(prepared: Path, folder: Path, number: int, draw: Random) -> Outcome:
    """Compare the two recordings of each rank, and look at the order of the syncs."""
    events = power_loss.events_of(prepared)
    published, problem = _order(events)
    for rank in (0, 1):
        ours = [(event.what, event.path) for event in power_loss.events_of_rank(prepared, rank)]
        theirs = _changes(prepared, rank)
        if ours != theirs:
            place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), -1)
            problem = problem or f"rank {rank}, event {place}: {ours[place]} was recorded, strace saw {theirs[place]}"
    counts = {"events": float(len(events)), "checkpoints published": float(published)}
    return Outcome("compared", problem, counts)


def _changes(prepared: Path, rank: int) -> list[tuple[str, str]]:
    """A rank's changes and syncs by strace, in the words of the recording."""
    found = []
    for call in strace.calls(prepared):
        if call.rank == rank:
            what = "create" if call.creates else AS_RECORDED.get(call.name)
            found += [(what, call.path.lstrip("/") or ".")] if what else []
    return [change for change in found if change != ("mkdir", ".")]  # the run's own folder, which is there already


def _order(events: list[Event]) -> tuple[int, str]:
    """How many checkpoints were published, and what was not synced when it should have been; empty if all was."""
    unsynced: dict[str, set[str]] = {}  # by folder, the files that were written since they were synced
    names: set[str] = set()  # folders in which a name was made since they were synced
    published, waiting = 0, ""
    for event in events:
        folder, _, name = event.path.rpartition("/")
        if event.what == "write":
            unsynced.setdefault(folder, set()).add(name)
        elif event.what in ("create", "mkdir"):
            names.add(folder or ".")
        elif event.what == "fsync":
            unsynced.get(folder, set()).discard(name)
            names.discard(event.path)
            if event.path == ".":
                published, waiting = published + bool(waiting), ""
        elif event.what == "rename" and HIDDEN_NAME.fullmatch(event.path) and STEP_NAME.fullmatch(event.other):
            if unsynced.get(event.path) or event.path in names:
                return published, f"{event.path} got its name before {unsynced.get(event.path) or 'it'} was synced"
            waiting = event.other
    return published, f"the run's folder was not synced after {waiting} got its name" if waiting else ""


SYNC_ORDER = Campaign(
    "sync-order",
    "the recording that power losses are drawn on is what strace sees, and all is synced before a checkpoint is named",
    prepare,
    case,
    cases=1,
    missing=strace.missing,
)
