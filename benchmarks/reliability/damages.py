"""Checkpoints are damaged on the disk, and the command that goes on with their run is given: never in silence.

The run of two ranks has three checkpoints; the newest is damaged, or all are. One process is asked to go on (the run
is complete but for its last step), so what it trains from shows in what it ends with, byte for byte.
"""

import ctypes
import hashlib
import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.reliability import broken, tiny_run
from benchmarks.reliability.campaign import Campaign, Outcome
from pentode.checkpoint.folder import newest, steps
from pentode.checkpoint.manifest import MANIFEST, FileFacts, Manifest

STEPS = 9  # three checkpoints
GOOD = str(STEPS - tiny_run.INTERVAL)
BLOCK = 4096
ALONE = 0.2  # share of the cases in which no older checkpoint is whole
HEADERS = (2**60, 2**63 - 1, 2**40, 2**31 - 1)  # lengths that a tensor file claims for its header
M_ARENA_MAX = -8  # of glibc's malloc.h
ROOM = 256 * 2**20  # bytes of memory that reading a damaged checkpoint may take beside what reading a good one does


@dataclass(frozen=True)
class Damage:
    """A kind of damage: how often among 3,000, which files it befalls, and what it does to one."""

    share: int
    befalls: Callable[[str], bool]
    does: Callable[[Path, Random], str | None]  # what else the warning may name; None: no more than the file
    fits: bool = False  # sizes and checksums are made to fit, which no accident does: to stop is as good


def is_tensors(name: str) -> bool:
    """Whether a file holds tensors."""
    return name.endswith(".safetensors")


def any_file(name: str) -> bool:
    """Any file of a checkpoint."""
    return True


def flip(path: Path, draw: Random) -> None:
    """Another bit."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def zero(path: Path, draw: Random) -> None:
    """A block of zeros, where there were none."""
    data = bytearray(path.read_bytes())
    while True:
        at = draw.randrange(-(-len(data) // BLOCK)) * BLOCK
        if any(data[at : at + BLOCK]):
            break
    data[at : at + BLOCK] = bytes(len(data[at : at + BLOCK]))
    path.write_bytes(data)


def truncate(path: Path, draw: Random) -> None:
    """A shorter file."""
    os.truncate(path, draw.randrange(1, path.stat().st_size))


def empty(path: Path, draw: Random) -> None:
    """No bytes."""
    os.truncate(path, 0)


def delete(path: Path, draw: Random) -> None:
    """No file."""
    path.unlink()


def swap(path: Path, draw: Random) -> str:
    """The bytes of another tensor file, which gets this one's."""
    others = [other for other in sorted(path.parent.glob("*.safetensors")) if other != path]
    other = draw.choice(others)
    mine = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)
    return other.name


def take_from_another_step(path: Path, draw: Random) -> None:
    """The file of the same name of an older checkpoint."""
    shutil.copy(path.parent.parent / str(tiny_run.INTERVAL) / path.name, path)


def edit_manifest(path: Path, draw: Random) -> str | None:
    """Another word in the manifest: a size, a checksum, a name, a step, a format, a file more or less."""
    found = json.loads(path.read_text())
    names = sorted(found["files"])
    name = draw.choice(names)
    facts = found["files"][name]
    how = draw.randrange(8)
    if how == 0:
        facts["size"] += draw.choice((-1, 1, 2**40))
    elif how == 1:
        facts["sha256"] = hashlib.sha256(draw.randbytes(4)).hexdigest()
    elif how == 2:
        del found["files"][name]
    elif how == 3:
        found["files"][f"x{name}"] = found["files"].pop(name)
    elif how == 4:
        found["step"] += draw.choice((-1, 1))
    elif how == 5:
        found["format"] = "pentode"
    elif how == 6:
        found["files"]["more.bin"] = {"size": 0, "sha256": hashlib.sha256().hexdigest()}
    else:
        found["digest"] = found["digest"][::-1]
    path.write_text(json.dumps(found, sort_keys=True, indent=1) + "\n")
    return name


def lengthen_header(path: Path, draw: Random) -> None:
    """A header that claims to be huge."""
    path.write_bytes(draw.choice(HEADERS).to_bytes(8, "little") + path.read_bytes()[8:])


def forge_header(path: Path, draw: Random) -> None:
    """The same, with a manifest that has the right size and checksum, as an attacker would make it."""
    lengthen_header(path, draw)
    data = path.read_bytes()
    manifest = Manifest.parse((path.parent / MANIFEST).read_bytes())
    files = {**manifest.files, path.name: FileFacts(len(data), hashlib.sha256(data).hexdigest())}
    (path.parent / MANIFEST).write_bytes(Manifest(manifest.step, files).dump())


DAMAGES = {
    "bit flipped": Damage(1000, any_file, flip),
    "block zeroed": Damage(500, any_file, zero),
    "truncated": Damage(500, any_file, truncate),
    "deleted": Damage(200, any_file, delete),
    "two files swapped": Damage(200, is_tensors, swap),
    "file of another step": Damage(200, lambda name: name not in SAME_IN_ALL, take_from_another_step),
    "manifest edited": Damage(200, MANIFEST.__eq__, edit_manifest),
    "emptied": Damage(100, any_file, empty),
    "huge header": Damage(50, is_tensors, lengthen_header),
    "huge header, checksums that fit": Damage(50, is_tensors, forge_header, fits=True),
}
SAME_IN_ALL = ("pentode_tokenizer.json",)
CASES = sum(damage.share for damage in DAMAGES.values())


def prepare(prepared: Path) -> None:
    """Make the run, take its last step away, and see what one process makes of each of its checkpoints."""
    config = tiny_run.write_config(prepared / "text", steps=STEPS, checkpoints__keep_last=None)
    root = prepared / "run"
    codes = tiny_run.train(config, root)
    assert codes == [0, 0], tiny_run.printed(root)
    expected = {}
    for start in (str(STEPS), GOOD):
        undamaged = tiny_run.copy(root, prepared / f"from-{start}")
        for folder in steps(undamaged):
            if int(folder.name) > int(start):
                shutil.rmtree(folder)
        assert _go_on(prepared, undamaged) == 0, tiny_run.printed(undamaged)
        expected[start] = _final(undamaged)
    (prepared / "expected.json").write_text(json.dumps(expected))


def _go_on(prepared: Path, root: Path) -> int:
    """The exit code of one process that is asked for one step more than the run has."""
    config = prepared / "text" / "tiny.yaml"
    more = ("parallelism.dp=1", "optimizer.zero_stage=0", f"tokens.train_steps={STEPS + 1}")
    (code,) = tiny_run.train(config, root, *more, world=1, prepare=_with_little_memory)
    return code


def _with_little_memory(rank: int) -> None:
    """Let this process have ROOM and no more beside what it has; addresses that threads reserve are no memory."""
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))


def _final(root: Path) -> dict[str, str]:
    found = newest(root)
    assert found is not None
    assert found.step == STEPS + 1
    return tiny_run.state_of(found)


def case(prepared: Path, folder: Path, number: int, draw: Random) -> Outcome:
    """One damage, and what the command makes of it."""
    name = draw.choices(list(DAMAGES), [damage.share for damage in DAMAGES.values()])[0]
    root = tiny_run.copy(prepared / "run", folder / "run")
    alone = draw.random() < ALONE
    hit, also = _strike(root / str(STEPS), DAMAGES[name], draw)
    if alone:
        for other in steps(root)[1:]:
            _strike(other, DAMAGES["bit flipped"], draw)
    code = _go_on(prepared, root)
    said = tiny_run.printed(root)
    to_stop = alone or (DAMAGES[name].fits and code == 66)
    problem, kind = (_not_stopped if to_stop else _not_fallen_back)(prepared, root, code, said, (hit, *also))
    told = f"{name}, {hit}{' in all checkpoints' if alone else ''}: {problem}\n{tiny_run.tail(root, 4)}"
    return Outcome(kind, told if problem else "", {name: 1})


def _strike(folder: Path, damage: Damage, draw: Random) -> tuple[str, list[str]]:
    """Damage one file; its name, and others that may be named in its place."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    victim = draw.choice([name for name in sorted(before) if damage.befalls(name)])
    more = damage.does(folder / victim, draw)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before != after, f"nothing was done to {victim}"
    return victim, [more] if more else []


def _not_stopped(prepared: Path, root: Path, code: int, said: str, names: tuple[str, ...]) -> tuple[str, str]:
    """What is wrong where there was nothing to go on from; and how it ended."""
    told = [line for line in said.splitlines() if line.startswith("pentode: ")]
    if code != 66:
        return f"exit code {code}, not 66", "silent" if code == 0 else "broke"
    if len(told) != 1 or not any(name in told[0] for name in names):
        return f"its line does not name {' or '.join(names)}: {told}", "stopped with exit 66"
    if "Traceback" in said:
        return "a traceback", "stopped with exit 66"
    return "", "stopped with exit 66"


def _not_fallen_back(prepared: Path, root: Path, code: int, said: str, names: tuple[str, ...]) -> tuple[str, str]:
    """What is wrong where an older checkpoint is good; and how it ended."""
    expected = json.loads((prepared / "expected.json").read_text())
    if code != 0:
        return f"exit code {code}", "stopped" if code == 66 else "broke"
    final = _final(root)
    if final == expected[str(STEPS)]:
        return "the damaged one was taken, and gave what it was before", "no effect"
    if final != expected[GOOD]:
        return "trained from something else", "silent"
    told = [line for line in said.splitlines() if "WARNING" in line and f"; going on from step {GOOD}" in line]
    if len(told) != 1 or not any(name in told[0] for name in names):
        return f"its warning does not name {' or '.join(names)}: {told}", "fell back"
    aside = [path for path in root.iterdir() if re.fullmatch(rf"\.bad-{STEPS}-[0-9a-f]{{8}}", path.name)]
    return ("" if len(aside) == 1 else "it is not set aside"), "fell back to the last good one"


DAMAGE = Campaign(
    "damages",
    "a damaged checkpoint is never trained from: the last good one is, with one warning, or exit 66 with one line",
    prepare,
    case,
    cases=CASES,
    broken=broken.trusting,
)
