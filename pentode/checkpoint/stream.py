"""A safetensors file written a tensor at a time, each made when its turn comes."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pentode.checkpoint import storage
from pentode.checkpoint.layout import Saved, entries, header
from pentode.checkpoint.manifest import FileFacts


class Wanted(NamedTuple):
    """A tensor that is not there yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it will take."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_stream(
    path: Path,
    wanted: Mapping[str, Wanted],
    make: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> FileFacts:
    """Write the tensors that `make` gives by name; one is in memory at a time. `metadata` as in `layout.header`."""
    group = {
        name: Saved.whole(torch.empty(shape, dtype=dtype, device="meta")) for name, (shape, dtype) in wanted.items()
    }
    found = [entry for entry, _ in entries(group)]

    def pieces() -> Iterator[bytes | memoryview]:
        yield header(found, metadata=metadata)
        for entry in found:
            tensor = make(entry.name)
            assert (tuple(tensor.shape), tensor.dtype) == (entry.block.shape, entry.dtype), f"{entry.name} is {tensor}"
            yield memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())

    return storage.write(path, pieces())
