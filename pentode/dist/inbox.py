"""A pipeline's messages between GPUs that reach each other's memory: written by copy engines where they are wanted.

NCCL's messages take multiprocessors, also while they wait for the other side, which in a pipeline is most of the time
(figures: docs/performance.md). Here nothing waits but the work that needs a message, and the sender for room.
"""

import torch
from torch import Tensor

from pentode import device as devices
from pentode.dist.mesh import Axis
from pentode.dist.symmetric import Handle, aligned, shared_buffer

PATIENCE = 20 * 60 * 1000  # milliseconds after which a neighbour is taken for hung, as NCCL's own messages would be
SIDES = 2  # neighbours that a rank has: the one before it, and the one behind


class Inbox:
    """On each rank of an axis, slots for what each neighbour sends, which sender and receiver go through in turn.

    A signal says that a slot is full, another that it was emptied. Of `slots` messages of a channel the receiver may
    wait for the last one first; what is sent beyond them waits, on a stream of its own, until slots are empty.
    """

    def __init__(self, handle: Handle, axis: Axis, *, device: torch.device, slots: int, slot_bytes: int) -> None:
        self.handle, self.axis, self.slots, self.slot_bytes = handle, axis, slots, slot_bytes
        neighbours = {(axis.rank + hop) % axis.size for hop in (1, -1)}
        self._streams = {peer: devices.new_stream(device) for peer in neighbours}
        self._sent = dict.fromkeys(self._streams, 0)
        self._received = dict.fromkeys(self._streams, 0)

    def send(self, tensor: Tensor, *, to: int) -> "Leaving":
        """Begin to write a tensor into a neighbour's next slot; it is not to be changed before it has left."""
        number = self._sent[to]
        self._sent[to] += 1
        slot, stream = number % self.slots, self._streams[to]
        stream.wait_stream(devices.current_stream(tensor.device))
        with stream:
            if number >= self.slots:
                self.handle.wait_signal(to, channel=self.slots + slot, timeout_ms=PATIENCE)
            self._room(tensor, of=to, source=self.axis.rank, slot=slot).copy_(tensor)
            self.handle.put_signal(to, channel=slot, timeout_ms=PATIENCE)
        return Leaving(stream.record_event(), tensor.device)

    def receive(self, into: Tensor, *, source: int) -> "Arriving":
        """A neighbour's next message, of the form of `into`, which it is copied to when it is waited for."""
        slot = self._received[source] % self.slots
        self._received[source] += 1
        return Arriving(self, into, source, slot)

    def take(self, into: Tensor, *, source: int, slot: int) -> None:
        """Copy what is in a slot when it is full, and give the slot back; the stream waits, not the host."""
        self.handle.wait_signal(source, channel=slot, timeout_ms=PATIENCE)
        into.copy_(self._room(into, of=self.axis.rank, source=source, slot=slot))
        self.handle.put_signal(source, channel=self.slots + slot, timeout_ms=PATIENCE)

    def _room(self, like: Tensor, *, of: int, source: int, slot: int) -> Tensor:
        """The slot on rank `of` for a tensor of this form from a neighbour."""
        side = 0 if (source + 1) % self.axis.size == of else 1
        offset = (side * self.slots + slot) * self.slot_bytes
        return self.handle.get_buffer(of, tuple(like.shape), like.dtype, offset // like.itemsize)


class Leaving:
    """A message on its way out."""

    def __init__(self, event: torch.Event, device: torch.device) -> None:
        self._event, self._device = event, device

    def is_completed(self) -> bool:
        """Whether it has left, without waiting."""
        return self._event.query()

    def wait(self) -> None:
        """The stream goes on when it has left."""
        devices.current_stream(self._device).wait_event(self._event)


class Arriving:
    """A message that is wanted."""

    def __init__(self, inbox: Inbox, into: Tensor, source: int, slot: int) -> None:
        self._inbox, self._into, self._source, self._slot = inbox, into, source, slot

    def wait(self) -> None:
        """The stream goes on when it is there."""
        self._inbox.take(self._into, source=self._source, slot=self._slot)


def open_inbox(axis: Axis, device: torch.device, *, slots: int, nbytes: int) -> Inbox | None:
    """The inboxes of an axis for messages of up to so many bytes; None where ranks cannot write each other's memory.

    All ranks of the axis call, with the same numbers.
    """
    slot_bytes = aligned(nbytes)
    handle = shared_buffer(axis, device, nbytes=SIDES * slots * slot_bytes, signals=2 * slots)
    return None if handle is None else Inbox(handle, axis, device=device, slots=slots, slot_bytes=slot_bytes)
