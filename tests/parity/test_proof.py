"""Ranks that prove a checkpoint together: each file is read by one, and what one of them finds holds for all."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pentode.checkpoint import proof, storage
from pentode.checkpoint.folder import open_checkpoint
from pentode.checkpoint.layout import Saved
from pentode.checkpoint.load import read_tensors
from pentode.checkpoint.manifest import FileFacts, Manifest
from pentode.checkpoint.proof import find_together, newest_together, shares
from pentode.checkpoint.save import save
from pentode.dist.mesh import everyone
from pentode.errors import CheckpointError, PentodeError, StorageError
from pentode.train import start
from tests.helpers.tiny import tiny_config
from tests.helpers.world import WORLD

WEIGHTS, OPTIMIZER = (f"{group}-00000-of-00001.safetensors" for group in ("weights", "optimizer"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run with checkpoints 1 and 2."""
    for step in (1, 2):
        write(tmp_path / "run", step)
    return tmp_path / "run"


def write(root: Path, step: int) -> Path:
    """Of two ranks, the first reads the state, which is the largest file here, the second all others."""
    groups = {
        "weights": {"w": Saved.whole(torch.full((64, 64), float(step)))},
        "optimizer": {"exp_avg/w": Saved.whole(torch.full((32, 32), float(step)))},
    }
    state = {"updates": step, "long": "x" * 20_000}
    return save(root, step=step, groups=groups, state=state, files={"config.yaml": b"general: {}\n"})


@contextmanager
def hashing() -> Iterator[list[int]]:
    """The sizes of the files that are hashed in this process meanwhile."""
    found, real = list[int](), storage.hash_file

    def hash_file(path: Path) -> FileFacts:
        found.append(path.stat().st_size)
        return real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "hash_file", hash_file)
        yield found


def refused(work: Callable[[], object]) -> str:
    """What all ranks are told alike of why they cannot go on."""
    with pytest.raises(CheckpointError) as raised:
        work()
    assert raised.value.everywhere
    return str(raised.value)


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 50), max_size=30), st.integers(1, 8))
def test_each_file_is_one_ranks_and_all_read_about_as_much(sizes: dict[str, int], ranks: int) -> None:
    files = {name: FileFacts(size, "") for name, size in sizes.items()}
    found = shares(files, ranks)
    assert sorted(name for names in found for name in names) == sorted(files)
    loads = [sum(sizes[name] for name in names) for names in found]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)
    assert found == shares(dict(reversed(files.items())), ranks)


def bytes_hashed(*, root: Path) -> int:
    """By this rank, to go on from the newest checkpoint, all of which it reads."""
    with hashing() as sizes:
        found = newest_together(root, everyone())
        assert found is not None
        assert (found.step, found.state["updates"]) == (2, 2)
        here = torch.empty(64, 64), torch.empty(32, 32)
        read_tensors(found, "weights", {"w": Saved.whole(here[0])})
        read_tensors(found, "optimizer", {"exp_avg/w": Saved.whole(here[1])})
        assert found.file("config.yaml")
    assert all(bool((tensor == 2).all()) for tensor in here)
    return sum(sizes)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_all_ranks_together_hash_each_file_once(root: Path, ranks: int) -> None:
    each = [bytes_hashed(root=root)] if ranks == 1 else WORLD.run(bytes_hashed, ranks, root=root)
    assert sum(each) == sum(facts.size for facts in open_checkpoint(root / "2").manifest.files.values())
    assert sum(map(bool, each)) == min(ranks, 4)  # files


def goes_on_from(*, folder: Path, on_corrupt: str) -> tuple[int | None, list[str]]:
    """The step that a run in folder/run goes on from, and the warnings of this rank."""
    config, told = tiny_config(folder, checkpoints__on_corrupt=on_corrupt), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pentode.log.warning", told.append)
        found = start._source(config, folder / "run")
    return found and found.step, told


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, "state.json", "manifest.json"])
def test_all_ranks_fall_back_from_what_one_of_them_finds_damaged(
    tmp_path: Path, root: Path, ranks: int, name: str
) -> None:
    data = (root / "2" / name).read_bytes()
    (root / "2" / name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
    arguments = {"folder": tmp_path, "on_corrupt": "fallback"}
    first, *others = [goes_on_from(**arguments)] if ranks == 1 else WORLD.run(goes_on_from, ranks, **arguments)
    step, (line,) = first
    assert step == 1
    assert name in line
    assert line.endswith("; going on from step 1")
    assert others == [(1, [])] * (ranks - 1)
    assert [path.name[:7] for path in sorted(root.iterdir())] == [".bad-2-", "1", "latest."]


def stops(*, folder: Path, on_corrupt: str) -> str:
    return refused(lambda: goes_on_from(folder=folder, on_corrupt=on_corrupt))


def test_a_run_that_asks_for_that_stops_on_all_ranks(tmp_path: Path, root: Path) -> None:
    (root / "2" / OPTIMIZER).write_bytes(b"")
    first, second = WORLD.run(stops, 2, folder=tmp_path, on_corrupt="stop")
    assert first == second
    assert first.startswith(f"checkpoint 2 in {root}: {OPTIMIZER} has 0 bytes, not ")
    assert first.endswith("; restore it from a copy or remove it, or set checkpoints.on_corrupt to fallback")
    assert (root / "2").exists()


def test_no_whole_checkpoint_stops_all_ranks(tmp_path: Path, root: Path) -> None:
    for step in "12":
        (root / step / OPTIMIZER).unlink()
    first, second = WORLD.run(stops, 2, folder=tmp_path, on_corrupt="fallback")
    assert first == second
    assert first.startswith(f"checkpoint 2 in {root}: {OPTIMIZER} cannot be read (No such file or directory); ")
    assert first.endswith(f"; no older checkpoint in {root} is whole, so nothing was trained")
    assert (root / "2").exists()


def sees_otherwise(*, folder: Path, here: str) -> str:
    """The second rank's folder is another; or its memory, which makes another checksum of what it reads."""
    root = folder / ("run" if everyone().rank == 0 else here)
    with pytest.MonkeyPatch.context() as patch:
        if here == "run" and everyone().rank == 1:
            patch.setattr(storage, "hash_file", lambda path: FileFacts(path.stat().st_size, "0" * 64))
        return refused(lambda: newest_together(root, everyone(), quarantine=True))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            None,
            "rank 1: checkpoint 2 in {run}: " + WEIGHTS + " is damaged, its checksum is wrong, where rank 0 finds",
        ),
        (shutil.rmtree, "{run}: rank 0 found step 2 to go on from, rank 1 no checkpoint"),
        (lambda other: shutil.rmtree(other / "2"), "{run}: rank 0 found step 2 to go on from, rank 1 step 1"),
        (
            lambda other: (other / "2" / "manifest.json").unlink(),
            "rank 1: {other}/2: it has no manifest.json, so it is",
        ),
        (lambda other: another(other / "2"), "{run}/2/manifest.json: rank 1 reads another than rank 0"),
        (lambda other: (other / "2" / "state.json").write_text("{"), "rank 1: {other}/2/state.json: "),
        (
            lambda other: (other / "2" / OPTIMIZER).unlink(),
            "rank 1: checkpoint 2 in {other}: " + OPTIMIZER + " cannot be",
        ),
    ],
    ids=["memory", "no run", "an older one", "no manifest", "manifest", "state", "file"],
)
def test_what_the_first_rank_finds_no_fault_in_is_not_set_aside(
    tmp_path: Path, root: Path, change: Callable[[Path], object] | None, told: str
) -> None:
    other = tmp_path / "other"
    if change is not None:
        shutil.copytree(root, other)
        change(other)
    before = sorted(root.iterdir())
    first, second = WORLD.run(sees_otherwise, 2, folder=tmp_path, here="run" if change is None else "other")
    assert first.startswith(told.format(run=root, other=other)) or second.startswith(told.format(run=root, other=other))
    assert first.endswith("checkpoints must be in a folder that all ranks see")
    assert sorted(root.iterdir()) == before


def another(folder: Path) -> None:
    """Another checkpoint of the same step, whole."""
    path = folder / "manifest.json"
    manifest = Manifest.parse(path.read_bytes())
    path.write_bytes(Manifest(manifest.step, {**manifest.files, "more.bin": FileFacts(0, "0" * 64)}).dump())


def finds(*, path: Path) -> Path | None:
    found = find_together(path, everyone())
    return found and found.folder


def finds_damaged(*, path: Path) -> str:
    return refused(lambda: find_together(path, everyone()))


def test_a_folder_means_its_checkpoint_or_its_newest(root: Path, tmp_path: Path) -> None:
    assert WORLD.run(finds, 2, path=root) == [root / "2"] * 2
    assert WORLD.run(finds, 2, path=root / "1") == [root / "1"] * 2
    assert WORLD.run(finds, 2, path=tmp_path / "none") == [None] * 2
    (root / "2" / OPTIMIZER).write_bytes(b"")
    assert WORLD.run(finds, 2, path=root) == [root / "1"] * 2
    assert (root / "2").exists(), "it may be another's"
    first, second = WORLD.run(finds_damaged, 2, path=root / "2")
    assert first == second
    assert first.endswith("; restore the checkpoint from a copy, or use another")


def finds_otherwise(*, path: Path, other: Path, at: int, fault: str) -> str:
    """Where one rank is given another folder, does not see the manifest, or may not look, list, read or set aside."""
    world, real = everyone(), Path.exists

    def exists(path: Path, **options: bool) -> bool:
        if path.name == "manifest.json" and fault == "refused":
            raise PermissionError(13, "Permission denied")
        return path.name != "manifest.json" and real(path, **options)

    def steps(root: Path) -> list[Path]:
        raise PermissionError(13, "Permission denied")

    def fail(*_: object) -> NoReturn:
        raise StorageError("the disk is gone")

    own = other if world.rank == at and fault == "other" else path
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == at and fault in ("refused", "unseen"):
            patch.setattr(Path, "exists", exists)
        if world.rank == at and fault == "unlisted":
            patch.setattr(proof, "steps", steps)
        if world.rank == at and fault == "full":
            patch.setattr(proof, "set_aside", fail)
        if world.rank == at and fault == "unread":
            patch.setattr(storage, "hash_file", fail)
        if world.rank == at and fault == "unopened":
            patch.setattr(proof, "with_manifest", fail)
        if fault == "unseen":
            found = find_together(own, world)
            return "" if found is None else found.folder.name
        work = partial(newest_together, quarantine=True) if fault in ("full", "unlisted") else find_together
        with pytest.raises(PentodeError) as raised:
            work(own, world)
    assert raised.value.everywhere
    return str(raised.value)


def test_what_one_rank_cannot_see_or_do_all_hear_of(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(root, other)
    (other / "2" / "state.json").write_text("{")
    arguments = {"path": root / "2", "other": other / "2"}
    assert WORLD.run(finds_otherwise, 2, at=1, fault="unseen", **arguments) == ["2", "2"]
    assert WORLD.run(finds_otherwise, 2, at=0, fault="unseen", **arguments) == ["", ""]
    shutil.rmtree(other / "1")
    for at, fault, told in (
        (1, "refused", "rank 1: "),
        (0, "refused", "rank 0: "),
        (1, "unlisted", "rank 1: "),
        (1, "unread", "rank 1: the disk is gone"),
        (1, "unopened", "rank 1: the disk is gone"),
        (1, "other", f"rank 1: {other}/2/state.json: "),
    ):
        first, second = WORLD.run(finds_otherwise, 2, at=at, fault=fault, **arguments)
        assert first == second
        assert first.startswith(told)
    shutil.rmtree(other / "2")
    first, second = WORLD.run(finds_otherwise, 2, at=1, fault="other", path=root, other=other)
    assert first == second.replace(str(other), str(root))
    assert first.startswith(f"{root}: rank 0 found step 2 to go on from, rank 1 no checkpoint")
    (root / "2" / "state.json").write_text("{")
    first, second = WORLD.run(finds_otherwise, 2, at=0, fault="full", path=root, other=other)
    assert first == second
    assert "the disk is gone" in first
