"""What a save costs the training: steps in which a snapshot is taken against steps without, on one GPU.

usage: python -m benchmarks.checkpoint_stall [--folder /dev/shm/stall] [--shape 1B] [--saves 10] [--only unstaged]

The 1B shape at micro-batch 4 x 2 accumulation. Prints, for a snapshot staged on the device and one that is not, the
median of the steps with it (from before the save to the end of the step after it) over the median step, and whether
the files of a save beside training are bitwise those of one that is waited for. Needs one checkpoint's bytes of the
host's memory, pinned, and as much in FOLDER: 17 GB each for 1B. Two saves are written to their ends, the others
given up when their snapshot is taken.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.shapes import CASES, Case, config_of
from pentode import device as devices
from pentode import log
from pentode.checkpoint.storage import hash_file
from pentode.config.load import config_from_dict
from pentode.dist.launch import World
from pentode.errors import RankError
from pentode.run.build import Run, build, initialise_weights
from pentode.train import saving
from pentode.train.loop import one_step
from pentode.train.replay import WARM_UP, Steps
from pentode.train.saving import DeviceRoom, Saver
from pentode.train.signals import StopSignal
from pentode.train.state import TrainState

BETWEEN = 2  # steps between two saves that are timed as normal ones, after one that is not
PARTS = ("files", "staged", "unstaged")
LIMITS = {True: 1.15, False: 1.6}  # of a normal step: staged on the device, and not


class Timed:
    """A run whose steps are timed until the device has done them."""

    def __init__(self, shape: str, folder: Path) -> None:
        data: dict[str, Any] = config_of(Case(shape, 4, micro_batches=2), folder)
        data["checkpoints"]["check_free_space"] = False
        self.run: Run = build(config_from_dict(data), World(), first_step=1)
        initialise_weights(self.run)
        self.state, self.root = TrainState(), folder
        self.saver = Saver(self.run, folder, StopSignal(self.run.device))
        self.steps = Steps(self.run, before_update=self.saver.before_update)

    def step(self, *, save: bool = False) -> float:
        """Milliseconds of a step; with `save`, of the save's beginning and the step after it."""
        devices.synchronize(self.run.device)
        began = time.perf_counter()
        if save:
            self.saver.save(self.state)
        one_step(self.run, self.state, self.steps)
        devices.synchronize(self.run.device)
        return (time.perf_counter() - began) * 1000

    def give_up(self) -> None:
        """End a save whose snapshot is taken: to write it all takes many times longer than what is measured."""
        cancelled = self.saver._background.cancelled
        cancelled.set()
        with suppress(RankError):
            self.saver.settle()
        cancelled.clear()


def main() -> None:
    """Measure, and print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="an empty or new folder; its content is removed")
    parser.add_argument("--shape", default="1B", choices=sorted({case.shape for case in CASES.values()}))
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("--only", choices=PARTS, help="one part of it; all three in turn if left out")
    asked = parser.parse_args()
    log.setup(level="error")
    root = asked.folder or Path(tempfile.mkdtemp(prefix="stall-"))
    if root.exists() and any(root.iterdir()):
        sys.exit(f"{root}: not empty; give an empty or new folder")
    root.mkdir(parents=True, exist_ok=True)
    try:
        _measure(Timed(asked.shape, root), asked.saves, parts=PARTS if asked.only is None else (asked.only,))
    finally:
        shutil.rmtree(root)


def _measure(timed: Timed, saves: int, *, parts: tuple[str, ...]) -> None:
    for _ in range(WARM_UP + 3):
        timed.step()
    alone = statistics.median(timed.step() for _ in range(saves))
    print(f"{devices.name(timed.run.device)}: a step without a save {alone:.1f} ms", flush=True)
    if "files" in parts:
        _compare(timed)
    if "staged" in parts:
        _time_saves(timed, saves, staged=True)
    if "unstaged" in parts:
        DeviceRoom.has = lambda room, size: False  # type: ignore[method-assign]
        _time_saves(timed, saves, staged=False)


def _time_saves(timed: Timed, saves: int, *, staged: bool) -> None:
    """Print the median of steps with a save, and of those without while one is written, over a normal step."""
    found: list[bool] = []
    real_snapshot = saving.Snapshot
    saving.Snapshot = lambda *a, **k: found.append(k["staged"]) or real_snapshot(*a, **k)  # type: ignore[misc]
    with_save, without, beside = [], [], []
    for number in range(saves + 1):
        took = timed.step(save=True)
        while_written = timed.step()
        timed.give_up()
        timed.step()
        if number:  # the first one makes the memory that the others use again
            with_save.append(took)
            without += [timed.step() for _ in range(BETWEEN)]
            beside.append(while_written)
    saving.Snapshot = real_snapshot  # type: ignore[misc]
    normal, slow = statistics.median(without), statistics.median(with_save)
    kind = "staged on the device" if staged else "not staged"
    verdict = "as asked" if slow / normal <= LIMITS[staged] else "too slow"
    if set(found) != {staged}:
        verdict = f"but staged was {found}: there was no room"
    print(
        f"{kind}: {slow:.1f} ms with a save, {normal:.1f} without: {slow / normal:.3f}, at most {LIMITS[staged]} "
        f"({verdict}); a step while it is written {statistics.median(beside):.1f} ms",
        flush=True,
    )


def _compare(timed: Timed) -> None:
    """Save once beside training and once waiting for it, and compare the files by their checksums."""
    names = {}
    for engine in ("beside", "waited"):
        timed.saver.root = timed.root / engine
        timed.saver.asynchronous = engine == "beside"
        timed.saver.save(timed.state)
        timed.saver.settle()
        folder = timed.saver.root / str(timed.state.step)
        names[engine] = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
        size = sum(facts.size for facts in names[engine].values())
        shutil.rmtree(timed.saver.root)
    timed.saver.root, timed.saver.asynchronous = timed.root, True
    same = "bitwise the same" if names["beside"] == names["waited"] else "DIFFERENT"
    print(
        f"files of a save beside training and of one that is waited for: {same}, {size:,} bytes",
        flush=True,
    )


if __name__ == "__main__":
    main()
