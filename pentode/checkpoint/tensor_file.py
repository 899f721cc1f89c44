"""A safetensors file that somebody else wrote: where in it each of its tensors lies."""

import stat
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from pentode.checkpoint.folder import HEADER_LIMIT, reason
from pentode.checkpoint.layout import DTYPES
from pentode.checkpoint.manifest import is_count, parse_json
from pentode.checkpoint.stored import InFile
from pentode.errors import CheckpointError

FOREIGN = DTYPES | {  # what may stand in their files beside the dtypes of ours
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}


class TensorFile(NamedTuple):
    """The tensors of a safetensors file by name, and what else its header says."""

    tensors: Mapping[str, InFile]
    metadata: Mapping[str, str]


def open_tensor_file(path: Path) -> TensorFile:
    """Read a safetensors file's header; CheckpointError where it, or its tensors' places, cannot be right."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a regular file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if found.st_size < 8 or length > min(found.st_size - 8, HEADER_LIMIT):
                raise ValueError(f"its header claims {length:,} bytes")
            table = parse_json(file.read(length))
        metadata = table.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its __metadata__ is not text by name")
        begin = 8 + length
        tensors = {name: _tensor(path, name, what, begin=begin) for name, what in table.items()}
        _check_places(tensors, begin, size=found.st_size)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}); fetch it again") from error
    return TensorFile(tensors, metadata)


def _tensor(path: Path, name: str, what: object, *, begin: int) -> InFile:
    if isinstance(what, dict) and set(what) == {"dtype", "shape", "data_offsets"} and str(what["dtype"]) in FOREIGN:
        shape, offsets, dtype = what["shape"], what["data_offsets"], FOREIGN[str(what["dtype"])]
        if isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2:
            right = all(map(is_count, [*shape, *offsets]))
            if right and offsets[1] - offsets[0] == prod(shape) * dtype.itemsize:
                return InFile(path, begin + offsets[0], dtype, tuple(shape))
    raise ValueError(f"{name} is described by {str(what)[:80]}")


def _check_places(tensors: Mapping[str, InFile], begin: int, *, size: int) -> None:
    """ValueError unless the tensors fill the file, without gaps and one after the other."""
    at = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != at:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        at += tensor.nbytes
    if at != size:
        raise ValueError(f"its tensors take {at - begin} bytes, its data {size - begin}")
