"""What loading promises: every tensor comes back bit for bit, however it is cut, and another model is refused."""

from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pentode import log
from pentode.checkpoint import storage
from pentode.checkpoint.folder import newest, open_checkpoint
from pentode.checkpoint.layout import Saved
from pentode.checkpoint.load import read_tensors
from pentode.checkpoint.save import save
from pentode.errors import CheckpointError
from pentode.parallel.spec import Box
from tests.helpers.faulty_os import FaultyOs

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
WEIGHTS = "weights-00000-of-00001.safetensors"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "os", FaultyOs())


def write(root: Path, tensors: dict[str, Tensor], *, step: int = 1) -> Path:
    whole = {name: Saved.whole(tensor) for name, tensor in tensors.items()}
    return save(root, step=step, groups={"weights": whole}, state={})


def read(folder: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    empty = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    read_tensors(open_checkpoint(folder), "weights", {name: Saved.whole(tensor) for name, tensor in empty.items()})
    return empty


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def some_of_each_dtype() -> dict[str, Tensor]:
    tensors = {f"layers.0.{str(dtype)[6:]}": (torch.randn(3, 5) * 50).to(dtype) for dtype in DTYPES}
    odd = {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "turned": torch.randn(4, 6).T,
        "b": torch.ones(1).bool(),
    }
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    return tensors | odd | {"special": special}


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = some_of_each_dtype()
    found = read(write(tmp_path, tensors), tensors)
    assert {name: bits(tensor) for name, tensor in found.items()} == {name: bits(x) for name, x in tensors.items()}


def test_the_official_library_reads_the_files(tmp_path: Path) -> None:
    tensors = some_of_each_dtype()
    found = load_file(write(tmp_path, tensors) / WEIGHTS)
    assert {name: bits(tensor) for name, tensor in found.items()} == {name: bits(x) for name, x in tensors.items()}


def test_saving_what_was_loaded_gives_the_same_files(tmp_path: Path) -> None:
    tensors = some_of_each_dtype()
    first = write(tmp_path / "a", tensors)
    second = write(tmp_path / "b", read(first, tensors))
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


def test_a_group_without_tensors_is_saved_and_read(tmp_path: Path) -> None:
    assert read(write(tmp_path, {}), {}) == {}


def test_tensors_are_aligned_in_their_file(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a": torch.ones(3).bfloat16(), "b": torch.ones(3), "c": torch.ones(1).double()})
    found = load_file(folder / WEIGHTS)
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in found.values())
    with (folder / WEIGHTS).open("rb") as file:
        assert int.from_bytes(file.read(8), "little") % 8 == 0


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], list[Box]]:
    """A local shape and boxes that cover the global `shape`: a grid, its rows in another order, padding behind them."""
    cuts = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    rows = draw(st.permutations(list(pairwise(cuts[0]))))
    boxes, at = [], 0
    for low, high in rows:
        for rest in product(*(list(pairwise(edges)) for edges in cuts[1:])):
            start, sizes = tuple(a for a, _ in rest), tuple(b - a for a, b in rest)
            boxes.append(Box((low, *start), (at, *start), (high - low, *sizes)))
        at += high - low
    padding = draw(st.integers(0, 2))
    return (shape[0] + padding, *shape[1:]), boxes


@given(data=st.data())
def test_any_cut_is_read_back_into_any_other(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    theirs, boxes = data.draw(layouts(shape))
    ours, wanted = data.draw(layouts(shape))
    whole = torch.randn(shape)
    there = torch.full(theirs, float("nan"))  # padding must never be saved
    for box in boxes:
        box.of_local(there).copy_(box.of_global(whole))
    here = torch.full(ours, -1.0)
    folder = save(
        tmp_path_factory.mktemp("run"), step=1, groups={"weights": {"w": Saved.of(there, shape, boxes)}}, state={}
    )
    read_tensors(open_checkpoint(folder), "weights", {"w": Saved.of(here, shape, wanted)})
    found = torch.full(shape, -2.0)
    for box in wanted:
        box.of_global(found).copy_(box.of_local(here))
    assert torch.equal(found, whole)
    assert bool((here[shape[0] :] == -1.0).all())  # padding is not touched


def test_a_box_that_is_not_the_whole_tensor_says_where_it_stands(tmp_path: Path) -> None:
    part = Saved((4, 3), [((2, 0), torch.ones(2, 3))])
    folder = save(tmp_path, step=1, groups={"weights": {"w": part}}, state={})
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        assert list(file.keys()) == ["w@2,0"]
        assert file.metadata()["global_shapes"] == '{"w": [4, 3]}'


def test_a_tensor_of_which_a_part_is_missing_is_not_loaded(tmp_path: Path) -> None:
    part = Saved((4, 3), [((2, 0), torch.ones(2, 3))])
    folder = save(tmp_path, step=1, groups={"weights": {"w": part}}, state={})
    with pytest.raises(CheckpointError, match=r"checkpoint 1 in .*: w is not whole"):
        read(folder, {"w": torch.empty(4, 3)})


@pytest.mark.parametrize(
    ("here", "message"),
    [
        ({"w": torch.empty(5, 3)}, r"w is \[2, 3\] there, \[5, 3\] here; the two models differ"),
        ({"w": torch.empty(2, 3).bfloat16()}, r"w is float32 there, bfloat16 here, which cannot hold it"),
        ({"w": torch.empty(2, 3), "v": torch.empty(1)}, r"v is not in its weights; the two models differ"),
        ({}, r"w is in its weights, but not in this model; the two models differ"),
    ],
    ids=["shape", "dtype", "missing", "extra"],
)
def test_another_model_is_refused_before_anything_is_read(
    tmp_path: Path, here: dict[str, Tensor], message: str
) -> None:
    folder = write(tmp_path, {"w": torch.ones(2, 3)}, step=1200)
    with pytest.raises(CheckpointError, match=f"^checkpoint 1200 in {tmp_path}: {message}"):
        read(folder, here)


def test_a_wider_dtype_takes_the_same_values(tmp_path: Path) -> None:
    tensor = torch.randn(3).bfloat16()
    assert torch.equal(read(write(tmp_path, {"w": tensor}), {"w": torch.empty(3)})["w"], tensor.float())


def test_a_group_or_file_that_was_not_saved_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, {"w": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"it has no optimizer"):
        read_tensors(checkpoint, "optimizer", {})
    with pytest.raises(CheckpointError, match=r"it has no tokenizer\.json"):
        checkpoint.file("tokenizer.json")


def test_the_newest_is_the_highest_number_not_the_last_name(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write(tmp_path, {"w": torch.ones(1)}, step=step)
    for other in ("0200", "notes", ".tmp-300-0123abcd", ".bad-300-0123abcd"):
        (tmp_path / other).mkdir()
    found = newest(tmp_path)
    assert found is not None
    assert (found.step, found.folder) == (100, tmp_path / "100")


def test_a_folder_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "missing") is None


def test_a_run_folder_given_for_a_checkpoint_is_answered_with_its_steps(tmp_path: Path) -> None:
    write(tmp_path, {"w": torch.ones(1)}, step=5)
    write(tmp_path, {"w": torch.ones(1)}, step=10)
    with pytest.raises(CheckpointError, match=r"so it is no checkpoint; give the folder of a step: 10, 5$"):
        open_checkpoint(tmp_path)


def test_only_the_trainer_renames_what_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.setup()
    write(tmp_path, {"w": torch.ones(1)}, step=1)
    (write(tmp_path, {"w": torch.ones(1)}, step=2) / WEIGHTS).write_bytes(b"")
    assert step_of(tmp_path) == 1
    assert (tmp_path / "2").exists()
    found = newest(tmp_path, quarantine=True)
    assert found is not None
    assert found.step == 1
    assert not (tmp_path / "2").exists()
    assert [path.name[:7] for path in sorted(tmp_path.glob(".bad*"))] == [".bad-2-"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert f"WARNING|DP=0|PP=0|TP=0]: checkpoint 2 in {tmp_path}: {WEIGHTS} has 0 bytes, not" in lines[0]
    assert lines[0].endswith("; going on from step 1")


def step_of(root: Path) -> int:
    found = newest(root)
    assert found is not None
    return found.step


def test_a_run_whose_checkpoints_are_all_damaged_stops_and_keeps_them(tmp_path: Path) -> None:
    (write(tmp_path, {"w": torch.ones(1)}, step=2) / WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no older checkpoint in .* is whole"):
        newest(tmp_path, quarantine=True)
    assert (tmp_path / "2").exists()


def test_a_newer_format_is_never_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"w": torch.ones(1)}, step=1)
    monkeypatch.setattr("pentode.checkpoint.manifest.FORMAT_VERSION", 2)
    write(tmp_path, {"w": torch.ones(1)}, step=2)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"its format version is 2, this Pentode reads 1; use the Pentode that"):
        newest(tmp_path)


def test_files_are_proven_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"w": torch.ones(2, 3)}
    write(tmp_path, tensors)
    found = newest(tmp_path)
    assert found is not None
    monkeypatch.setattr("pentode.checkpoint.storage.hash_file", None)
    here = torch.empty(2, 3)
    read_tensors(found, "weights", {"w": Saved.whole(here)})
    assert torch.equal(here, tensors["w"])
