"""Ranks that load a checkpoint: a file's header is read by one of them; else a file is opened for its tensors alone."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pentode.checkpoint import stored
from pentode.checkpoint.folder import Checkpoint, DamagedError, open_checkpoint
from pentode.checkpoint.load import global_shapes
from pentode.checkpoint.manifest import FileFacts, Manifest
from pentode.checkpoint.proof import hear_headers, open_together
from pentode.checkpoint.save import save
from pentode.dist.launch import World
from pentode.dist.mesh import everyone
from pentode.errors import CheckpointError, StorageError
from pentode.run.build import Run, build, initialise_weights
from pentode.train.state import TrainState, content, restore
from tests.helpers.tiny import tiny_config
from tests.helpers.world import WORLD

WRITERS = 4
LAST = f"optimizer-{WRITERS - 1:05}-of-{WRITERS:05}.safetensors"


def run_in(folder: Path, *, tp: int = 1, **changes: Any) -> Run:
    """A run on the ranks that there are, each with its shards of the optimizer's state."""
    here = World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()
    dp = here.size // tp
    layout = {"parallelism": {"dp": dp, "pp": 1, "tp": tp}, "optimizer__zero_stage": int(dp > 1)}
    return build(tiny_config(folder, **layout, tokens__micro_batch_size=1, **changes), here, first_step=1)


def write(*, folder: Path) -> None:
    run = run_in(folder)
    initialise_weights(run)
    save(folder / "run", **content(run, TrainState()), world=run.mesh.world)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoint 0 of a run of four ranks: eight tensor files."""
    WORLD.run(write, WRITERS, folder=tmp_path)
    return tmp_path


def opens(*, folder: Path, tp: int, begun_with: bool) -> tuple[Counter[str], Counter[str]]:
    """How often this rank opens each tensor file when it loads a proven checkpoint: for its header, for its tensors."""
    headers, tensors = Counter[str](), Counter[str]()
    really_open, really_read = Path.open, stored.np.fromfile

    def open_noted(path: Path, *arguments: Any, **more: Any) -> Any:
        headers[path.name] += path.suffix == ".safetensors"
        return really_open(path, *arguments, **more)

    def read_noted(path: Path, **more: Any) -> Any:
        tensors[path.name] += 1
        return really_read(path, **more)

    checkpoint = open_together(folder / "run" / "0", everyone())
    run = run_in(folder, tp=tp, **({"model__init_method": {"path": str(folder / "run")}} if begun_with else {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pentode.run.build.find_together", lambda path, world: checkpoint)
        patch.setattr(stored.np, "fromfile", read_noted)
        patch.setattr(Path, "open", open_noted)
        if begun_with:
            initialise_weights(run)
        else:
            restore(run, checkpoint)
    return +headers, tensors


@pytest.mark.parametrize("begun_with", [False, True], ids=["restored", "begun with"])
@pytest.mark.parametrize(("ranks", "tp"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_the_header_of_each_file_is_read_once_by_all_ranks_together(
    folder: Path, ranks: int, tp: int, begun_with: bool
) -> None:
    arguments = {"folder": folder, "tp": tp, "begun_with": begun_with}
    found = [opens(**arguments)] if ranks == 1 else WORLD.run(opens, ranks, **arguments)
    headers, tensors = zip(*found, strict=True)
    checkpoint = open_checkpoint(folder / "run" / "0")
    files = [name for group in checkpoint.groups() for name in checkpoint.files_of(group)]
    assert len(files) == 2 * WRITERS
    assert sum(headers, Counter[str]()) == Counter(files)
    assert [len(own) for own in headers] == [len(files) // ranks] * ranks
    if not begun_with and ranks > 1:
        assert any(len(own) < len(files) for own in tensors), "nobody reads everything"


def forge(folder: Path, name: str, content: bytes) -> None:
    """Another file under a manifest that has its checksum."""
    (folder / name).write_bytes(content)
    manifest = Manifest.parse((folder / "manifest.json").read_bytes())
    facts = FileFacts(len(content), hashlib.sha256(content).hexdigest())
    (folder / "manifest.json").write_bytes(Manifest(manifest.step, {**manifest.files, name: facts}).dump())


def refused(*, folder: Path, blind: int | None) -> str:
    """What this rank is told of why the checkpoint cannot be read; rank `blind` sees damage where there is none."""
    checkpoint = open_together(folder / "run" / "0", everyone())
    run = run_in(folder)

    def not_read(self: Checkpoint, name: str, **_: bool) -> tuple[int, bytes]:
        raise DamagedError(f"{self}: {name}: its header claims 9 bytes")

    with pytest.MonkeyPatch.context() as patch:
        if everyone().rank == blind:
            patch.setattr(Checkpoint, "header", not_read)
        with pytest.raises(CheckpointError) as raised:
            restore(run, checkpoint)
    assert raised.value.everywhere
    return str(raised.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ((2**60).to_bytes(8, "little"), f"its header claims {2**60:,} bytes"),
        (b"\2" + bytes(7) + b"{}", "its header lacks the global shapes"),
    ],
    ids=["huge", "empty"],
)
@pytest.mark.parametrize("name", [LAST, LAST.replace("optimizer", "weights")])
def test_a_damaged_header_is_told_alike_on_all_ranks_whoever_read_it(
    folder: Path, name: str, content: bytes, told: str
) -> None:
    forge(folder / "run" / "0", name, content)
    first, *others = WORLD.run(refused, 4, folder=folder, blind=None)
    assert others == [first] * 3
    assert first.startswith(f"checkpoint 0 in {folder / 'run'}: {name}: {told}")
    assert first.endswith("; restore the checkpoint from a copy, or use another")


def test_a_header_that_another_rank_alone_cannot_read_is_no_damage(folder: Path) -> None:
    first, second = WORLD.run(refused, 2, folder=folder, blind=1)
    assert first == second
    assert first.startswith(f"rank 1: checkpoint 0 in {folder / 'run'}: ")
    assert first.endswith(
        ": its header claims 9 bytes, where rank 0 finds no fault; checkpoints must be in a folder that all ranks see"
    )


def cannot_look(*, folder: Path) -> str:
    """What this rank is told where the last one cannot even say which files there are."""
    checkpoint, here = open_together(folder / "run" / "0", everyone()), everyone()

    def no_files(self: Checkpoint, group: str) -> list[str]:
        raise StorageError("the disk is gone")

    with pytest.MonkeyPatch.context() as patch:
        if here.rank == here.size - 1:
            patch.setattr(Checkpoint, "files_of", no_files)
        with pytest.raises(StorageError) as raised:
            hear_headers(checkpoint, ["weights"], here)
    assert raised.value.everywhere
    return str(raised.value)


def test_what_keeps_one_rank_from_looking_all_are_told(folder: Path) -> None:
    assert WORLD.run(cannot_look, 2, folder=folder) == ["rank 1: the disk is gone"] * 2


def shapes(*, folder: Path) -> dict[str, tuple[int, ...]]:
    checkpoint = open_together(folder / "run" / "0", everyone())
    hear_headers(checkpoint, ["weights"], everyone())
    for name in checkpoint.files_of("weights"):
        (folder / "run" / "0" / name).unlink(missing_ok=True)
    return global_shapes(checkpoint, "weights")


def test_what_was_heard_needs_no_file(folder: Path) -> None:
    expected = global_shapes(open_checkpoint(folder / "run" / "0"), "weights")
    assert WORLD.run(shapes, 3, folder=folder) == [expected] * 3
