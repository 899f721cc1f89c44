"""What saving together promises: any layout is read in any other, and one rank's error is everybody's, never a hang."""

import errno
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import BrokenBarrierError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from pentode.checkpoint import storage
from pentode.checkpoint.folder import newest, open_checkpoint
from pentode.checkpoint.layout import Saved, entries, share_of
from pentode.checkpoint.load import read_tensors
from pentode.checkpoint.save import clean, file_names, save
from pentode.dist.mesh import Axis
from pentode.errors import CheckpointError, RankError, StorageError
from pentode.parallel.shards import pieces_of_range
from tests.helpers.faulty_os import Crash, FaultyOs
from tests.helpers.layouts import Parameter, layouts, numbered, parameters
from tests.helpers.thread_ranks import on_thread_ranks


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "os", FaultyOs())


def together(work: Callable[[Axis], object], ranks: int) -> None:
    errors = [error for error in on_thread_ranks(work, [FaultyOs() for _ in range(ranks)]) if error is not None]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, BrokenBarrierError))  # the cause, not those it left alone


@given(data=st.data(), of_names=st.dictionaries(st.sampled_from("abc"), parameters(), min_size=1))
def test_any_layout_is_read_in_any_other(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, of_names: dict[str, Parameter]
) -> None:
    written = {name: data.draw(layouts(parameter), label=f"{name} written") for name, parameter in of_names.items()}
    ranks = max(map(len, written.values()))

    def work(world: Axis) -> None:
        tensors = {}
        for name, places in written.items():
            pieces = []
            for spec, start, stop in places[world.rank :: ranks]:
                flat = spec.take(numbered(spec.global_shape)).flatten()[start:stop]
                pieces += pieces_of_range(spec, flat, start, owned=True)
            tensors[name] = Saved(of_names[name].shape, pieces)
        save(root, step=1, groups={"weights": tensors}, state={}, world=world)

    root = tmp_path_factory.mktemp("run")
    together(work, ranks)
    checkpoint = open_checkpoint(root / "1")
    for name, parameter in of_names.items():
        for spec, start, stop in data.draw(layouts(parameter), label=f"{name} read"):
            flat = torch.full((stop - start,), -1.0)
            into = Saved(parameter.shape, pieces_of_range(spec, flat, start, owned=False))
            read_tensors(checkpoint, "weights", {name: into}, names=of_names)
            there = spec.take(numbered(parameter.shape)).flatten()[start:stop]
            assert torch.equal(flat, torch.where(there > 0, there, -1.0))


@given(
    shapes=st.dictionaries(st.text("abc", min_size=1, max_size=2), st.lists(st.integers(1, 6), max_size=3), min_size=1),
    ranks=st.integers(1, 9),
)
def test_shares_cover_what_ranks_hold_alike_once_and_are_equal(shapes: dict[str, list[int]], ranks: int) -> None:
    tensors = {name: numbered(tuple(shape)) for name, shape in shapes.items()}
    group = {name: Saved.whole(tensor.double() if "a" in name else tensor) for name, tensor in tensors.items()}
    shares = [share_of(group, Axis("data", ranks, rank)) for rank in range(ranks)]
    for name, tensor in tensors.items():
        found = torch.zeros_like(tensor)
        for start, piece in (piece for share in shares for piece in share[name].pieces):
            part = found[tuple(slice(at, at + size) for at, size in zip(start, piece.shape, strict=True))]
            part += piece
        assert torch.equal(found, tensor)
    sizes = [sum(saved.nbytes for saved in share.values()) for share in shares]
    assert max(sizes) - min(sizes) <= 2 * 8, "an element more at either end"


def test_a_share_is_whole_tensors_but_at_its_ends() -> None:
    group = {name: Saved.whole(numbered((8, 4, 2))) for name in "abcdefgh"}
    shares = [share_of(group, Axis("data", 3, rank)) for rank in range(3)]
    pieces = [2 + 3, 3 + 2 + 2, 2 + 2]  # of 512 elements 171, 171 and 170: two whole tensors each
    assert [len(list(entries(share))) for share in shares] == pieces


def rows(low: int, high: int) -> Saved:
    return Saved((6, 2), [((low, 0), numbered((6, 2))[low:high])])


NOTHING = Saved((6, 2), [])
WEIGHTS = (NOTHING, rows(0, 4), rows(4, 6))
OPTIMIZER = (rows(0, 2), rows(2, 4), rows(4, 6))


def save_together(root: Path, step: int, world: Axis) -> Path:
    groups = {"weights": {"w": WEIGHTS[world.rank]}, "optimizer": {"m": OPTIMIZER[world.rank]}, "none": {}}
    return save(root, step=step, groups=groups, state={"updates": step}, files={"a": b"of all"}, world=world)


def held(root: Path) -> int:
    """The newest checkpoint's step, all of it read and right."""
    checkpoint = newest(root)
    assert checkpoint is not None
    for group, name in (("weights", "w"), ("optimizer", "m")):
        found = torch.empty(6, 2)
        read_tensors(checkpoint, group, {name: Saved.whole(found)})
        assert torch.equal(found, numbered((6, 2)))
    return checkpoint.step


def test_each_rank_that_has_something_of_a_group_writes_one_file(tmp_path: Path) -> None:
    together(lambda world: save_together(tmp_path, 1, world), 3)
    files = open_checkpoint(tmp_path / "1").manifest.files
    assert sorted(files) == [
        "a",
        "none-00000-of-00001.safetensors",
        *(f"optimizer-0000{number}-of-00003.safetensors" for number in range(3)),
        "state.json",
        *(f"weights-0000{number}-of-00002.safetensors" for number in range(2)),
    ]
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == sorted([*files, "manifest.json"])
    with safe_open(tmp_path / "1" / "weights-00001-of-00002.safetensors", framework="pt") as file:
        assert (list(file.keys()), file.metadata()["global_shapes"]) == (["w@4,0"], '{"w": [6, 2]}')
    assert held(tmp_path) == 1


def test_a_group_of_which_nobody_has_anything_is_the_first_ranks() -> None:
    held: list[Mapping[str, bool]] = [{"a": False}, {"a": False, "b": True}]
    assert [file_names(held, rank) for rank in (0, 1)] == [
        {"a": "a-00000-of-00001.safetensors"},
        {"b": "b-00000-of-00001.safetensors"},
    ]


def test_every_rank_returns_the_folder_of_the_published_checkpoint(tmp_path: Path) -> None:
    def work(world: Axis) -> None:
        folder = save_together(tmp_path, 1, world)
        assert open_checkpoint(folder).step == 1

    together(work, 3)


def test_an_error_at_any_call_of_any_rank_is_raised_by_all_and_undone(tmp_path: Path) -> None:
    cause, _ = storage.CAUSES[errno.ENOSPC]
    tensors = 2 * 6 * 2 * 4  # bytes
    for rank, call, root in each_call(tmp_path):
        systems = [FaultyOs(fail_at=call if rank == other else None, code=errno.ENOSPC) for other in range(3)]
        raised = on_thread_ranks(lambda world, root=root: save_together(root, 2, world), systems)
        if raised == [None] * 3:
            assert held(root) == 2, "only latest.txt, which nobody reads, may fail without an error"
        else:
            assert {type(error) for error in raised} == {StorageError}
            needed = tensors + sum((root / "1" / name).stat().st_size for name in ("a", "state.json"))
            assert all(re.match(rf"rank {rank}: {root}.*: {cause} \({needed} bytes are needed", str(e)) for e in raised)
        assert held(root) in {1, 2}
        assert [path.name for path in root.iterdir() if path.name.startswith(".tmp-2")] == []


def test_the_end_of_any_rank_at_any_call_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    for rank, call, root in each_call(tmp_path):
        systems = [FaultyOs(fail_at=call if rank == other else None) for other in range(3)]
        raised = on_thread_ranks(lambda world, root=root: save_together(root, 2, world), systems)
        assert isinstance(raised[rank], Crash)
        clean(root)
        assert held(root) in {1, 2}
        together(lambda world, root=root: save_together(root, 2, world), 3)
        assert held(root) == 2
        assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []


def each_call(base: Path) -> list[tuple[int, int, Path]]:
    """A rank and the number of a call that it makes while step 2 is saved, and a new run with step 1 to do that in."""
    systems = [FaultyOs() for _ in range(3)]
    (base / "count").mkdir()
    on_thread_ranks(lambda world: save_together(base / "count", 2, world), systems)
    found = []
    for rank, system in enumerate(systems):
        assert {"open", "write", "fsync"} < set(system.calls)
        for call in range(len(system.calls)):
            root = base / f"{rank}-{call}"
            together(lambda world, root=root: save_together(root, 1, world), 3)
            found.append((rank, call, root))
    return found


def test_what_only_the_first_rank_is_wrong_in_stops_all(tmp_path: Path) -> None:
    def work(world: Axis) -> None:
        state = {"loss": float("nan") if world.rank == 0 else 0.0}
        save(tmp_path, step=1, groups={}, state=state, world=world)

    raised = on_thread_ranks(work, [FaultyOs(), FaultyOs()])
    assert [type(error) for error in raised] == [RankError, RankError]
    assert all(str(error).startswith("rank 0: Traceback") for error in raised)
    assert all("ValueError: Out of range float" in str(error) for error in raised)
    assert list(tmp_path.iterdir()) == []


def two_stages(root: Path) -> Path:
    groups = {"weights": {name: Saved.whole(numbered((2,))) for name in ("first", "last")}}
    return save(root, step=1, groups=groups, state={})


def test_a_stage_reads_its_part_of_the_model(tmp_path: Path) -> None:
    found = torch.empty(2)
    read_tensors(
        open_checkpoint(two_stages(tmp_path)), "weights", {"last": Saved.whole(found)}, names=("first", "last")
    )
    assert torch.equal(found, numbered((2,)))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("last",), "first is in its weights, but not in this model"),
        (("first", "last", "more"), "more is not in its weights"),
    ],
)
def test_a_stage_refuses_another_model_by_what_other_stages_hold(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    checkpoint = open_checkpoint(two_stages(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        read_tensors(checkpoint, "weights", {"last": Saved.whole(torch.empty(2))}, names=names)


def test_only_the_rows_that_are_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(save(tmp_path, step=1, groups={"w": {"w": Saved.whole(numbered((8, 4)))}}, state={}))
    read, counts = np.fromfile, []
    monkeypatch.setattr(np, "fromfile", lambda *given, **named: counts.append(named["count"]) or read(*given, **named))
    block = torch.empty(2, 3)
    read_tensors(checkpoint, "w", {"w": Saved((8, 4), [((5, 1), block)])})
    assert torch.equal(block, numbered((8, 4))[5:7, 1:4])
    assert counts == [2 * 4 * 4]  # bytes of rows 5 and 6


@pytest.mark.parametrize("boxes", [[(0, 4)], [(0, 4), (2, 6)], [(0, 4), (3, 5)]], ids=["lost", "twice", "both"])
def test_each_element_must_be_there_once(tmp_path: Path, boxes: list[tuple[int, int]]) -> None:
    pieces = [piece for low, high in boxes for piece in rows(low, high).pieces]
    checkpoint = open_checkpoint(save(tmp_path, step=1, groups={"w": {"w": Saved((6, 2), pieces)}}, state={}))
    with pytest.raises(CheckpointError, match="w is not whole, or parts of it are there twice"):
        read_tensors(checkpoint, "w", {"w": Saved.whole(torch.empty(6, 2))})
