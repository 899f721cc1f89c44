"""Messages between two ranks: a pipeline's channels, and the ring that tensor-parallel operators pass pieces around.

A channel is for one ordered pair of pipeline neighbours, first in, first out. GPUs of one host write into each other's
inbox (`dist/inbox.py`). For others, both directions of a pair have process groups of their own, so that what one rank
sends never queues behind what it waits for. Both sides must name a channel's messages in the same order; a schedule's
transfers do (`with_transfers`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pentode import device as devices
from pentode.dist.collectives import gather_objects
from pentode.dist.inbox import Arriving, Inbox, Leaving, open_inbox
from pentode.dist.mesh import Axis
from pentode.dist.symmetric import Pane, Read, window

Tensors = tuple[Tensor, ...]
BLOCKS = 4  # thread blocks of a message on a GPU: each takes a multiprocessor, also while it waits for the other side


class Form(NamedTuple):
    """What the receiver of a tensor must know beforehand."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Receipt:
    """Tensors on their way here; `sent` is kept until they have come, where one message goes each way."""

    tensors: Tensors
    works: Sequence[dist.Work | Read | Arriving]
    sent: Tensor | None = None

    def wait(self) -> Tensors:
        """The tensors, when they have come; on a GPU the stream waits, not the host."""
        for work in self.works:
            work.wait()
        return self.tensors


class Ring:
    """What one operator passes on: tensors that every rank of an axis sends at once, each to the one `hop` further.

    All ranks make one, with the same bytes, and call the same. GPUs that can read each other's memory do so
    (`dist/symmetric.py`); others, and CPUs, send messages.

    nbytes  of all that the operator will pass on
    """

    def __init__(self, axis: Axis, *, device: torch.device, nbytes: int) -> None:
        self.axis, self.device = axis, device
        self.window = window(axis, device, nbytes=nbytes)
        self._panes: dict[int, Pane] = {}
        if self.window is not None:
            self.window.turn()

    def room(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory to compute something in that is to be passed on; elsewhere it would be copied first."""
        if self.window is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        pane = self.window.take(shape, dtype)
        self._panes[pane.here.data_ptr()] = pane
        return pane.here

    def start(self, x: Tensor, *, hop: int, into: Tensor) -> Receipt:
        """Begin to pass x on to the rank `hop` further, and to receive as much from behind; forward only, no backward.

        x is not to be changed before the receipt has been waited for.
        """
        target, source = ((self.axis.rank + move) % self.axis.size for move in (hop, -hop))
        if self.window is None:
            sent = x.contiguous()
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, sent, group=self.axis.group, group_peer=target),
                    dist.P2POp(dist.irecv, into, group=self.axis.group, group_peer=source),
                ]
            )
            return Receipt((into,), works, sent)
        pane = self._panes.get(x.data_ptr())
        if pane is None:
            pane = self._panes[x.data_ptr()] = self.window.take(tuple(x.shape), x.dtype)
            pane.here.copy_(x)
        return Receipt((into,), [self.window.start_read(pane, source, into)])


class Channels:
    """This rank's ends of the channels along one pipeline axis."""

    def __init__(self, pp: Axis, groups: dict[tuple[int, int], dist.ProcessGroup], *, device: torch.device) -> None:
        self.pp, self.rank, self.device = pp, pp.rank, device
        self.inbox: Inbox | None = None
        self._groups = groups
        self._sent: list[tuple[dist.Work | Leaving, Tensor]] = []

    def open_inbox(self, *, slots: int, nbytes: int) -> None:
        """Let messages of up to so many bytes go by copy engines, where GPUs can; all ranks call, with their own bytes.

        slots  how many messages of a channel may be on their way while a later one is waited for first
        """
        if self.pp.size > 1 and devices.is_gpu(self.device):
            largest = max(gather_objects(nbytes, self.pp))
            self.inbox = open_inbox(self.pp, self.device, slots=slots, nbytes=largest)

    def send(self, tensors: Tensors, *, to: int) -> None:
        """Begin to send to a rank of the axis, and return at once; the tensors are kept until they have gone."""
        self._sent = [(work, tensor) for work, tensor in self._sent if not work.is_completed()]
        for tensor in tensors:
            whole = tensor.contiguous()
            inbox = self._inbox_for(whole)
            if inbox is not None:
                work = inbox.send(whole, to=to)
            else:
                work = dist.isend(whole, group=self._groups[self.rank, to], group_dst=_place(to, self.rank))
            assert work is not None, f"rank {self.rank} is not in the group of channel {self.rank} -> {to}"
            self._sent.append((work, whole))

    def receive(self, forms: Sequence[Form], *, source: int) -> Receipt:
        """Begin to receive tensors of these forms from a rank of the axis, and return at once."""
        tensors = tuple(torch.empty(form.shape, dtype=form.dtype, device=self.device) for form in forms)
        group, place = self._groups[source, self.rank], _place(source, self.rank)
        works = [
            dist.irecv(tensor, group=group, group_src=place) if inbox is None else inbox.receive(tensor, source=source)
            for tensor in tensors
            for inbox in [self._inbox_for(tensor)]
        ]
        return Receipt(tensors, [work for work in works if work is not None])

    def _inbox_for(self, tensor: Tensor) -> Inbox | None:
        return self.inbox if self.inbox is not None and tensor.nbytes <= self.inbox.slot_bytes else None

    def flush(self) -> None:
        """Go on when all that was sent has gone; on a GPU the stream does, not the host."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()


def connect(pp: Axis, *, device: torch.device) -> Channels:
    """Open the channels between neighbours on the pipeline axis, the last and the first being neighbours too.

    Every rank of the world must call. A first message goes through each channel: a GPU's are set up by that, and both
    sides wait for each other there, which later, in the middle of a schedule, could be for ever.
    """
    if pp.size == 1:
        return Channels(pp, {}, device=device)
    lines, options = _every_line(pp), devices.small_messages(device, blocks=BLOCKS)
    pairs = sorted({pair for i in range(pp.size) for pair in ((i, (i + 1) % pp.size), ((i + 1) % pp.size, i))})
    groups: dict[tuple[int, int], dist.ProcessGroup] = {}
    for line in lines:
        for source, target in pairs:
            group = dist.new_group([line[source], line[target]], pg_options=options)
            if line[pp.rank] == dist.get_rank() and pp.rank in (source, target):
                assert isinstance(group, dist.ProcessGroup), f"rank {pp.rank} got no group for {source} -> {target}"
                groups[source, target] = group
    channels = Channels(pp, groups, device=device)
    hello = torch.zeros(1, device=device)
    for source, target in pairs:
        if pp.rank == source:
            channels.send((hello,), to=target)
            channels.flush()
        elif pp.rank == target:
            channels.receive([Form((1,), hello.dtype)], source=source).wait()
    return channels


def _every_line(pp: Axis) -> list[list[int]]:
    """The world ranks of all pipelines; this rank knows its own, and the grid is regular: pp is its outermost axis."""
    stride = dist.get_world_size() // pp.size
    return [list(range(first, dist.get_world_size(), stride)) for first in range(stride)]


def _place(of: int, other: int) -> int:
    """A rank's place in the group of a pair, which torch orders by world rank, as the line is ordered."""
    return int(of > other)
