"""A Nanotron checkpoint, read: the shape that it tells, and where in its many files each part of a weight lies.

Each file has one tensor, `data`: a whole parameter, or a tensor-parallel rank's shard, whose header says which slices
of it are which slices of the whole. Pickled files (optimizer, scheduler, random states) are never read.
"""

import re
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from pentode.checkpoint.folder import steps
from pentode.checkpoint.hf import read_json
from pentode.checkpoint.names import our_tensors
from pentode.checkpoint.stored import InFile, Stored, StoredTensor, Weights
from pentode.checkpoint.tensor_file import open_tensor_file
from pentode.errors import CheckpointError
from pentode.nn.names import NameTable
from pentode.parallel.shards import Block, disjoint

SHAPE = "model_config.json"
MODEL = "model"
LATEST = "latest.txt"
PAIRS, WHOLE = "local_global_slices_pairs", "unsharded_shape"

# model_weight.safetensors, model_weight_pp-rank-0-of-1_tp-rank-1-of-2.safetensors, and as Nanotron spelled them for a
# time: model_model_weight.safetensors.safetensors, model_model_weight.safetensors_pp-rank-... .safetensors
FILE = re.compile(
    r"model_(?:model_)?(?P<name>\w+?)(?:\.safetensors)?(?P<shard>(?:_(?:pp|tp|exp)-rank-\d+-of-\d+)+)?\.safetensors",
    re.ASCII,
)
OF_TRAINING = (  # keys of its shapes that say how a model was trained, and nothing about its weights
    "_attn_implementation",
    "_use_doc_masking",
    "flex_attention_mask",
    "log_attn_probs",
    "ring_attn_heads_k_stride",
)
NUMBER = r"(?:np\.int64\((\d+)\)|(\d+))"  # some versions of numpy print their numbers so


def is_nanotron_folder(path: Path) -> bool:
    """Whether a folder is a checkpoint of Nanotron's, or holds some."""
    return _is_step(path) or any(map(_is_step, steps(path)))


def nanotron_folder(path: Path) -> Path:
    """The checkpoint's own folder: `path`, or the one in it that latest.txt names, or the newest."""
    if _is_step(path):
        return path
    inside = [folder for folder in steps(path) if _is_step(folder)] if path.is_dir() else []
    named = (path / LATEST).read_text(errors="replace").strip() if (path / LATEST).is_file() else ""
    found = [folder for folder in inside if folder.name == named] or inside
    if not found:
        raise CheckpointError(f"{path}: has no {SHAPE} beside a folder {MODEL}, so it is no checkpoint of Nanotron's")
    return found[0]


def nanotron_shape(folder: Path) -> dict[str, Any]:
    """What the checkpoint says of its model, as the keys of `model.model_config` in a config.

    A Qwen2 model is taken for a Llama: where it is none, one of its keys says so, and no config accepts that.
    """
    found = read_json(folder / SHAPE)
    if found.pop("is_qwen2_config", False):
        found["is_llama_config"] = True
    return {key: value for key, value in found.items() if key not in OF_TRAINING}


def nanotron_weights(folder: Path, names: NameTable, *, tied: bool) -> Weights:
    """The weights in the folder, by our names; no more than headers is read. Raises CheckpointError."""
    found: dict[str, list[StoredTensor]] = {}
    for path in _files(folder):
        match = FILE.fullmatch(path.name)
        if match is None:
            raise CheckpointError(f"{path}: is not named as Nanotron names the file of a parameter")
        name = ".".join([*path.parent.relative_to(folder / MODEL).parts, match["name"]])
        found.setdefault(name, []).append(_part(path))
    theirs = {name: _joined(folder, name, parts) for name, parts in found.items()}
    return Weights(str(folder), SHAPE, our_tensors(names, theirs, tied=tied, where=str(folder)))


def _is_step(folder: Path) -> bool:
    return (folder / SHAPE).is_file() and (folder / MODEL).is_dir()


def _files(folder: Path) -> Iterator[Path]:
    found = sorted((folder / MODEL).rglob("*.safetensors"))
    if not found:
        why = "the datastates engine wrote them" if any((folder / MODEL).rglob("*.datastates")) else "none are there"
        raise CheckpointError(f"{folder}: has no weights in safetensors ({why}); use a checkpoint that has them")
    return iter(found)


def _part(path: Path) -> StoredTensor:
    """The parameter that a file is of, with those boxes that the file has."""
    tensors, metadata = open_tensor_file(path)
    if "data" not in tensors:
        raise CheckpointError(f"{path}: has no tensor named data, as each file of Nanotron's has")
    tensor = tensors["data"]
    if PAIRS not in metadata:
        return StoredTensor.of(tensor)
    shape = _numbers(metadata.get(WHOLE, ""))
    boxes = [_box(tensor, shape, pair) for pair in metadata[PAIRS].split(";")] if shape is not None else [None]
    known = [box for box in boxes if box is not None]
    inside = [Block(box.start, box.block.shape) for box in known]
    covered = sum(prod(block.shape) for block in inside) == prod(tensor.shape) and disjoint(inside)
    if shape is None or len(known) < len(boxes) or not covered:
        said = f"{metadata.get(WHOLE)}, {metadata[PAIRS]}"
        raise CheckpointError(f"{path}: its slices do not describe a shard of {list(tensor.shape)} ({said[:200]})")
    return StoredTensor(shape, known)


def _box(tensor: InFile, shape: tuple[int, ...], pair: str) -> Stored | None:
    """A pair of slices, `local#global`, as a box; None where they contradict each other or the tensors' shapes."""
    here, _, there = pair.partition("#")
    local, whole = _slices(here, tensor.shape), _slices(there, shape)
    if local is None or whole is None or local.shape != whole.shape:
        return None
    return Stored(whole, tensor, local.start)


def _slices(text: str, shape: tuple[int, ...]) -> Block | None:
    """`0,10,None|None,None,None`, a start, a stop and a step along each dim, as a block of a tensor of this shape."""
    words = [triple.split(",") for triple in text.split("|")]
    if len(words) != len(shape) or any(len(triple) != 3 for triple in words):
        return None
    start, sizes = [], []
    for (first, stop, step), size in zip(words, shape, strict=True):
        begin, end = (0 if first == "None" else _count(first)), (size if stop == "None" else _count(stop))
        if begin is None or end is None or not begin <= end <= size or step not in ("None", "1"):
            return None
        start.append(begin)
        sizes.append(end - begin)
    return Block(tuple(start), tuple(sizes))


def _count(text: str) -> int | None:
    match = re.fullmatch(NUMBER, text.strip(), re.ASCII)
    return int(match[1] or match[2]) if match else None


def _numbers(text: str) -> tuple[int, ...] | None:
    """`(49152, 576)` as numbers; None if it is no such text."""
    match = re.fullmatch(rf"\(\s*({NUMBER}(?:\s*,\s*{NUMBER})*),?\s*\)", text, re.ASCII)
    return tuple(int(a or b) for a, b in re.findall(NUMBER, match[1])) if match else None


def _joined(folder: Path, name: str, parts: Sequence[StoredTensor]) -> StoredTensor:
    """A parameter of all its files."""
    shapes = sorted({part.global_shape for part in parts})
    if len(shapes) > 1:
        several = " and ".join(str(list(shape)) for shape in shapes)
        raise CheckpointError(f"{folder}: files of {name} are of {several}; they are not of one checkpoint")
    return StoredTensor(shapes[0], [box for part in parts for box in part.boxes])
