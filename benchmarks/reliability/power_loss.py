"""Power fails at any moment of a run that saves and prunes, again while the next start tidies up; see `disk.py`.

What two real ranks do to the disk, in a run from its first save to its end, is recorded once. A case cuts that at a
moment, loses a part of what was not synced, and starts: the newest checkpoint that was published before, or a newer
one, must be there, whole and right. The controls take one kind of sync out of the recording and must be noticed.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path
from random import Random

from benchmarks.reliability import tiny_run
from benchmarks.reliability.campaign import Campaign, Outcome
from benchmarks.reliability.disk import Event, Node, TracingOs, after_power_loss
from pentode.checkpoint import storage
from pentode.checkpoint.folder import newest, open_checkpoint, steps
from pentode.checkpoint.manifest import HIDDEN_NAME, STEP_NAME
from pentode.checkpoint.save import clean
from pentode.errors import CheckpointError

STEPS = 12
AGAIN = 0.3  # share of the cases in which power fails again during the next start
WITHIN = 1000  # cases in which a missing sync must be found
RUN = "run"


def record(prepared: Path) -> None:
    """Run, and keep the events of all ranks in events.jsonl, and what each checkpoint held beside it."""
    record_run(tiny_run.write_config(prepared / "text", steps=STEPS), prepared)


def record_run(config: Path, prepared: Path, *, attach: Callable[[list[int]], object] | None = None) -> None:
    """`record`, of a config, with something attached to the ranks."""
    root = prepared / RUN
    root.mkdir()

    def trace(rank: int) -> None:
        file = (prepared / f"events-{rank}.jsonl").open("w")

        def tell(event: Event) -> None:
            file.write(event.as_json() + "\n")
            file.flush()
            if event.what == "fsync" and event.path == ".":
                _note_steps(prepared, root)

        storage.os = TracingOs(root, tell)

    codes = tiny_run.train(config, root, prepare=trace, attach=attach)
    assert codes == [0, 0], tiny_run.printed(root)
    events = sorted((event for rank in (0, 1) for event in events_of_rank(prepared, rank)), key=lambda e: e.done)
    (prepared / "events.jsonl").write_text("\n".join(event.as_json() for event in events))


def events_of_rank(prepared: Path, rank: int) -> list[Event]:
    """What one rank did, in order."""
    return list(map(Event.of_json, (prepared / f"events-{rank}.jsonl").read_text().splitlines()))


def _note_steps(prepared: Path, root: Path) -> None:
    """Keep what each checkpoint holds while it is there: it may be pruned later."""
    for folder in steps(root):
        kept = prepared / f"step-{folder.name}.json"
        if not kept.exists():
            kept.write_text(json.dumps(tiny_run.state_of(open_checkpoint(folder))))


@cache
def events_of(prepared: Path) -> list[Event]:
    """What `record` recorded."""
    return [Event.of_json(line) for line in (prepared / "events.jsonl").read_text().splitlines()]


def case(prepared: Path, folder: Path, number: int, draw: Random) -> Outcome:
    """One power failure, or two."""
    return one_loss(prepared, folder, events_of(prepared), draw)


def one_loss(prepared: Path, folder: Path, events: list[Event], draw: Random) -> Outcome:
    """A moment and what is lost by `draw`, then a start, which may fail in the same way, and what it finds."""
    moment = a_moment(events, draw)
    root = folder / RUN
    after_power_loss(Node(folder=True), events[:moment], draw).write_out(root)
    twice = draw.random() < AGAIN
    if twice:
        _fail_while_cleaning(root, folder / "again", draw)
    clean(root)
    published = last_published(events[:moment])
    problem = wrong(prepared, root, published)
    said = f"power fails after event {moment} of {len(events)}{', and again' if twice else ''}: {problem}"
    kind = "nothing saved yet" if published is None else "power failed twice" if twice else "power failed once"
    return Outcome(kind, said if problem else "")


def a_moment(events: list[Event], draw: Random) -> int:
    """How many events were done: every second time one that is about names is the last of them or the next."""
    if draw.random() < 0.5:
        return draw.randrange(len(events) + 1)
    naming = [index for index, event in enumerate(events) if event.what != "write"]
    return draw.choice(naming) + draw.randrange(2)


def wrong(prepared: Path, root: Path, published: int | None) -> str:
    """What is not right with a run's folder after a start, of which that step was published; empty if all is."""
    try:
        for folder in steps(root):
            open_checkpoint(folder).verify()
        found = newest(root)
    except CheckpointError as error:
        return str(error)
    if found is None:
        return "" if published is None else f"step {published} is lost, and all others"
    if found.step < (published or 0):
        return f"step {published} is lost, {found.step} is the newest"
    if tiny_run.state_of(found) != json.loads((prepared / f"step-{found.step}.json").read_text()):
        return f"step {found.step} is not what was saved"
    return ", ".join(tiny_run.leftovers(root))


def last_published(events: list[Event]) -> int | None:
    """The newest step whose folder's name was synced; the save of it has returned or will next."""
    published, named = None, None
    for event in events:
        if event.what == "rename" and HIDDEN_NAME.fullmatch(event.path) and STEP_NAME.fullmatch(event.other):
            named = int(event.other)
        elif event.what == "fsync" and event.path == "." and named is not None:
            published = named
    return published


def _fail_while_cleaning(root: Path, other: Path, draw: Random) -> None:
    """Tidy up, and lose power at some moment of that."""
    before = Node.read(root)
    events: list[Event] = []
    real = storage.os
    storage.os = TracingOs(root, events.append)
    try:
        clean(root)
    finally:
        storage.os = real
    after_power_loss(before, events[: draw.randrange(len(events) + 1)], draw).write_out(other)
    root.rename(root.with_name("before"))
    other.rename(root)


def syncs(events: list[Event]) -> Iterator[tuple[int, str]]:
    """The syncs that a published checkpoint rests on, by index, and what each is for; others may be missing."""
    last: Event | None = None
    for index, event in enumerate(events):
        if event.what != "fsync":
            last = event if event.what == "rename" else last
        elif event.path == ".":
            if last is not None and STEP_NAME.fullmatch(last.other):
                yield index, "the run's folder, after a checkpoint got its name"
            elif last is not None and STEP_NAME.fullmatch(last.path):
                yield index, "the run's folder, after a checkpoint lost its name"
        elif "/" not in event.path:
            if HIDDEN_NAME.fullmatch(event.path):
                yield index, "a checkpoint's folder"
        else:
            name = Path(event.path).name
            yield index, name


def kinds_of_syncs(prepared: Path) -> list[str]:
    """What the syncs are for, each once."""
    found = {what for _, what in syncs(events_of(prepared))}
    return sorted(found)


def count_of_controls(prepared: Path) -> int:
    """How many kinds of syncs there are to take out."""
    return len(kinds_of_syncs(prepared))


def control(prepared: Path, folder: Path, number: int, draw: Random) -> Outcome:
    """All syncs of one kind taken out: a case must go wrong before there were WITHIN of them."""
    events = events_of(prepared)
    kind = kinds_of_syncs(prepared)[number]
    gone = {index for index, what in syncs(events) if what == kind}
    careless = [event for index, event in enumerate(events) if index not in gone]
    for tries in count(1):
        inside = folder / str(tries)
        inside.mkdir()
        if _seen(prepared, inside, events=events, careless=careless, draw=draw):
            return Outcome("found", counts={f"cases until found without a sync of {kind}": tries})
        if tries == WITHIN:
            break
    return Outcome("not found", f"{WITHIN} cases did not show that a sync is missing: {kind}")


def _seen(prepared: Path, folder: Path, *, events: list[Event], careless: list[Event], draw: Random) -> bool:
    """Whether a power failure in a run without some syncs loses what the run with them promises."""
    moment = a_moment(careless, draw)
    until = careless[moment].done if moment < len(careless) else events[-1].done + 1
    root = folder / RUN
    after_power_loss(Node(folder=True), careless[:moment], draw).write_out(root)
    clean(root)
    return bool(wrong(prepared, root, last_published([event for event in events if event.done < until])))


POWER_LOSS = Campaign(
    "power-loss",
    "power fails at any moment, once or twice: the newest published checkpoint or a newer one is there, whole",
    record,
    case,
    cases=5000,
)
CONTROLS = Campaign(
    "power-loss-controls",
    f"a save without one kind of sync is caught within {WITHIN} cases",
    record,
    control,
    points=count_of_controls,
)
