"""A damaged or hostile checkpoint is never trained from: it falls back to an older one, or stops with one line."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pentode.checkpoint.folder import newest, open_checkpoint
from pentode.checkpoint.layout import Saved, parse_header
from pentode.checkpoint.load import read_tensors
from pentode.checkpoint.manifest import FileFacts, Manifest
from pentode.checkpoint.save import save
from pentode.errors import CheckpointError

NAMES = ["config.yaml", "manifest.json", "optimizer-00000-of-00001.safetensors", "state.json"]
NAMES += ["weights-00000-of-00001.safetensors"]
WEIGHTS = NAMES[-1]


def write(root: Path, step: int) -> Path:
    generator = torch.Generator().manual_seed(step)
    groups = {
        "weights": {"w": Saved.whole(torch.randn(8, 16, generator=generator))},
        "optimizer": {"exp_avg/w": Saved.whole(torch.randn(8, 16, generator=generator))},
    }
    return save(root, step=step, groups=groups, state={"updates": step}, files={"config.yaml": b"general: {}\n"})


def everything(root: Path) -> tuple[object, ...]:
    """All that a resume takes from the newest checkpoint."""
    checkpoint = newest(root)
    assert checkpoint is not None
    weights, moments = torch.empty(8, 16), torch.empty(8, 16)
    read_tensors(checkpoint, "weights", {"w": Saved.whole(weights)})
    read_tensors(checkpoint, "optimizer", {"exp_avg/w": Saved.whole(moments)})
    return checkpoint.step, checkpoint.state, checkpoint.file("config.yaml"), weights.tolist(), moments.tolist()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, tuple[object, ...]]]:
    """A run with checkpoints 1, 2 and 3, and what each of 2 and 3 gives when it is loaded."""
    root = tmp_path_factory.mktemp("saved") / "run"
    found = {}
    for step in (1, 2, 3):
        write(root, step)
        found[step] = everything(root)
    return root, found


def flip(path: Path, draw: Callable[..., int]) -> None:
    data = bytearray(path.read_bytes())
    data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    path.write_bytes(data)


def zero(path: Path, draw: Callable[..., int]) -> None:
    data = bytearray(path.read_bytes())
    at = draw(st.integers(0, len(data) - 1))
    data[at : at + 64] = bytes(len(data[at : at + 64]))
    path.write_bytes(data)


def truncate(path: Path, draw: Callable[..., int]) -> None:
    os.truncate(path, draw(st.integers(0, path.stat().st_size - 1)))


def extend(path: Path, draw: Callable[..., int]) -> None:
    path.write_bytes(path.read_bytes() + bytes(draw(st.integers(1, 9))))


def delete(path: Path, draw: Callable[..., int]) -> None:
    path.unlink()


def swap(path: Path, draw: Callable[..., int]) -> None:
    other = path.parent / draw(st.sampled_from([name for name in NAMES if name != path.name]))
    mine = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)


def take_from_another_step(path: Path, draw: Callable[..., int]) -> None:
    shutil.copy(path.parent.parent / "1" / path.name, path)


def link(path: Path, draw: Callable[..., int]) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def make_a_folder_of_it(path: Path, draw: Callable[..., int]) -> None:
    path.unlink()
    path.mkdir()


def make_a_pipe_of_it(path: Path, draw: Callable[..., int]) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = [flip, zero, truncate, extend, delete, swap, take_from_another_step, link, make_a_folder_of_it]
DAMAGES += [make_a_pipe_of_it]


@settings(max_examples=200)
@given(data=st.data(), name=st.sampled_from(NAMES), damage=st.sampled_from(DAMAGES), alone=st.booleans())
def test_no_damage_is_silent(
    saved: tuple[Path, dict[int, tuple[object, ...]]],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    name: str,
    damage: Callable[..., None],
    alone: bool,
) -> None:
    original, found = saved
    root = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(original, root)
    damage(root / "3" / name, data.draw)
    if alone:
        shutil.rmtree(root / "1")
        shutil.rmtree(root / "2")
    try:
        loaded, message = everything(root), ""
    except CheckpointError as error:
        loaded, message = None, str(error)
    if loaded is None:
        assert alone
        assert str(root) in message
        assert "\n" not in message
    else:
        assert loaded in ([found[3]] if alone else [found[3], found[2]])  # a byte within white space may change nothing


@settings(max_examples=50)
@given(data=st.data(), name=st.sampled_from(NAMES[2:]), damage=st.sampled_from(DAMAGES))
def test_one_checkpoint_opened_by_its_folder_is_proven_too(
    saved: tuple[Path, dict[int, tuple[object, ...]]],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    name: str,
    damage: Callable[..., None],
) -> None:
    root = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(saved[0], root)
    damage(root / "3" / name, data.draw)
    with pytest.raises(CheckpointError):
        read_all(root / "3")


def read_all(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    read_tensors(checkpoint, "weights", {"w": Saved.whole(torch.empty(8, 16))})
    read_tensors(checkpoint, "optimizer", {"exp_avg/w": Saved.whole(torch.empty(8, 16))})


def test_a_folder_renamed_to_another_step_is_not_that_step(tmp_path: Path) -> None:
    write(tmp_path, 1).rename(tmp_path / "7")
    with pytest.raises(CheckpointError, match=r"/7/manifest\.json: it is that of step 1"):
        newest(tmp_path)


def test_a_folder_copied_under_a_name_that_is_no_step_can_be_opened(tmp_path: Path) -> None:
    shutil.copytree(write(tmp_path, 1), tmp_path / "best")
    assert open_checkpoint(tmp_path / "best").step == 1


def test_a_manifest_from_which_a_line_was_taken_is_noticed(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["config.yaml"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"changed after it was written"):
        open_checkpoint(folder)


HOSTILE_NAMES = [
    "../state.json",
    "/etc/passwd",
    "a/../../b",
    "..",
    ".hidden",
    "a\x00b",
    "C:\\x",
    "A",
    "%2e%2e/x",
    "",
    "a\n",
]


@pytest.mark.parametrize("name", [*HOSTILE_NAMES, "x" * 122, "\N{ARABIC-INDIC DIGIT ONE}"])
def test_a_manifest_cannot_name_what_is_not_in_its_folder(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, 1)
    forge(folder, {name: FileFacts(1, "0" * 64)})
    with pytest.raises(CheckpointError, match=r"it lists a file named"):
        open_checkpoint(folder)


def forge(folder: Path, more: dict[str, FileFacts]) -> None:
    """A manifest that contradicts nothing, as somebody with bad intentions would write it."""
    manifest = Manifest.parse((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_bytes(Manifest(manifest.step, {**manifest.files, **more}).dump())


HEADERS = {
    "too long": (2**60).to_bytes(8, "little"),
    "longer than the file": (1000).to_bytes(8, "little") + b"{}",
    "cut off": b"\x02\x00",
    "empty": b"",
    "not JSON": (3).to_bytes(8, "little") + b"abc",
    "nested": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "no metadata": (2).to_bytes(8, "little") + b"{}",
    "not UTF-8": (2).to_bytes(8, "little") + b"\xff\xfe",
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_tensor_file_with_a_hostile_header_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path, 1)
    (folder / WEIGHTS).write_bytes(content)
    forge(folder, {WEIGHTS: FileFacts(len(content), hashlib.sha256(content).hexdigest())})
    with pytest.raises(CheckpointError, match=rf"checkpoint 1 in .*: {WEIGHTS}: "):
        read_all(folder)


METADATA = {"__metadata__": {"global_shapes": '{"w": [4, 3]}'}}
ENTRIES = {
    "beyond the data": {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}},
    "a gap": {"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    "one over another": {
        "v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    },
    "a shape of other bytes": {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
    "negative": {"w": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}},
    "huge": {"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}},
    "a boolean": {"w": {"dtype": "U8", "shape": [8, True], "data_offsets": [0, 8]}},
    "a fraction": {"w": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
    "a foreign dtype": {"w": {"dtype": "F8", "shape": [8], "data_offsets": [0, 8]}},
    "a dtype that is a list": {"w": {"dtype": [], "shape": [8], "data_offsets": [0, 8]}},
    "more than there should be": {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "run": "x"}},
    "no description": {"w": None},
    "three offsets": {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 16]}},
    "outside its tensor": {"w@4,0": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}},
    "of other dimensions": {"w@1": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    "at no number": {"w@a,b": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}},
    "before its tensor": {"w@-1,0": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}},
    "of an unknown shape": {"v@0,0": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}},
}


@pytest.mark.parametrize("table", ENTRIES.values(), ids=ENTRIES)
def test_a_header_that_contradicts_itself_is_refused(table: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        parse_header(json.dumps(METADATA | table).encode(), data_size=8)


def test_the_header_that_those_are_variants_of_is_accepted() -> None:
    table = {"w@3,1": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}
    (entry,) = parse_header(json.dumps(METADATA | table).encode(), data_size=8)
    assert (entry.name, entry.global_shape, entry.block.start, entry.key) == ("w", (4, 3), (3, 1), "w@3,1")


STATES = {"NaN": b'{"step": NaN}', "twice": b'{"step": 1, "step": 2}', "a list": b"[]", "deep": b"[" * 100_000}


@pytest.mark.parametrize("content", STATES.values(), ids=STATES)
def test_a_state_that_is_no_strict_json_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path, 1)
    (folder / "state.json").write_bytes(content)
    forge(folder, {"state.json": FileFacts(len(content), hashlib.sha256(content).hexdigest())})
    with pytest.raises(CheckpointError, match=r"/1/state\.json: it "):
        open_checkpoint(folder)


def test_a_manifest_without_the_state_falls_back_to_an_older_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    path = tmp_path / "2" / "manifest.json"
    whole = Manifest.parse(path.read_bytes())
    path.write_bytes(Manifest(2, {name: facts for name, facts in whole.files.items() if name != "state.json"}).dump())
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 1
