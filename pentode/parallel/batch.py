"""One micro-batch as one rank sees it: flat tokens, their labels, and where each stands.

T = B * S tokens, sample-major: the B sequences of S tokens one after another (design 1.6).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100  # the label of a token whose successor is not to be learned


@dataclass(frozen=True)
class Batch:
    """Tokens and labels of one micro-batch.

    tokens     [T] int64, ids below the vocabulary size
    labels     [T] int64, the token to predict at each place, or IGNORE
    positions  [T] int64, place within the sequence, counting from 0
    samples    [B] int64, each sequence's number in the run, counting all ranks and stages; dropout is keyed by it
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    samples: Tensor

    @property
    def sequence_length(self) -> int:
        """Tokens in each sequence, S."""
        return self.tokens.numel() // self.samples.numel()

    def valid(self) -> Tensor:
        """How many tokens count in the loss, 0-d int64."""
        return (self.labels != IGNORE).sum()

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device, copied without waiting where the memory is pinned."""
        if self.tokens.device == device:
            return self
        return self._of(self.buffer().to(device, non_blocking=True))

    def packed(self) -> "Batch":
        """The same batch, its tensors side by side in a buffer of its own, which moves in one copy."""
        return self._of(self.buffer().clone())

    def buffer(self) -> Tensor:
        """All numbers in one tensor: the one that the fields are views of where they are, else a new one."""
        found = self._in_place()
        return torch.cat(self._parts()) if found is None else found

    def _parts(self) -> list[Tensor]:
        return [self.tokens, self.labels, self.positions, self.samples]

    def _in_place(self) -> Tensor | None:
        """The tensor that the fields are views of, side by side and in their order, if there is one."""
        parts = self._parts()
        starts = [part.storage_offset() for part in parts]
        ends = [start + part.numel() for start, part in zip(starts, parts, strict=True)]
        storages = {part.untyped_storage().data_ptr() for part in parts}
        if len(storages) == 1 and starts[1:] == ends[:-1] and all(part.is_contiguous() for part in parts):
            return parts[0].as_strided((ends[-1] - starts[0],), (1,))
        return None

    def _of(self, buffer: Tensor) -> "Batch":
        """A batch of these shapes, of which the buffer holds the numbers."""
        tokens, sequences = self.tokens.numel(), self.samples.numel()
        return Batch(*buffer.split([tokens, tokens, tokens, sequences]))


def batches_of(rows: Tensor, *, samples: Tensor, pin: bool = False) -> list[Batch]:
    """N micro-batches of whole sequences, cut out of one buffer, in pinned memory with `pin`.

    rows [N, B, S + 1] give tokens rows[..., :-1] and labels rows[..., 1:]; samples [N, B].
    """
    count, sequences, length = rows.shape[0], rows.shape[1], rows.shape[2] - 1
    sizes = [sequences * length] * 3 + [sequences]
    buffer = torch.empty(count, sum(sizes), dtype=torch.int64, device=rows.device, pin_memory=pin)
    tokens, labels, positions, numbers = buffer.split(sizes, dim=1)
    shape = (sequences, length)
    tokens.unflatten(1, shape).copy_(rows[..., :-1])
    labels.unflatten(1, shape).copy_(rows[..., 1:])
    positions.unflatten(1, shape).copy_(torch.arange(length, device=rows.device))
    numbers.copy_(samples)
    return [Batch(*row.split(sizes)) for row in buffer]


def batch_of(rows: Tensor, *, samples: Tensor, mask: Tensor | None = None, pin: bool = False) -> Batch:
    """A Batch of whole sequences: rows [B, S + 1] give tokens rows[:, :-1] and labels rows[:, 1:]; samples [B].

    `mask` [B, S] is False where a label is not to be learned.
    """
    (batch,) = batches_of(rows[None], samples=samples[None], pin=pin)
    if mask is not None:
        batch.labels.masked_fill_(~mask.flatten(), IGNORE)
    return batch
