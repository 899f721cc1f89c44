"""Runs a rank's program: the one interpreter of every schedule, with or without a pipeline."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from pentode.dist.p2p import Channels, Form, Receipt, Tensors
from pentode.parallel.batch import Batch
from pentode.parallel.pipeline.schedules import Action, Schedule, forward_only
from pentode.parallel.pipeline.simulate import Transfer, messages_at_once, with_transfers

Key = tuple[str, int, int]  # "activation" or "gradient", the stage that made it, micro-batch


class Stage(Protocol):
    """One stage of a model: a module, which also says what passes between stages.

    That is one tensor, or several of any dtypes; those of floating point carry a gradient back.
    """

    def __call__(self, x: Tensor | Tensors | None, batch: Batch) -> Tensor | Tensors:
        """The output of the stage before (None: there is none) to this one's, or to the sum of the tokens' losses."""
        ...

    def takes(self, batch: Batch) -> tuple[Form, ...]:
        """What the stage before gives this one for a batch."""
        ...

    def gives(self, batch: Batch) -> tuple[Form, ...]:
        """What this stage gives the next one."""
        ...


class Pipeline:
    """This rank's part of a pipeline: its stages by number, what it does in a step, and its neighbours.

    A model in one piece is a pipeline of one stage, which goes the same way.
    """

    def __init__(self, stages: Mapping[int, Stage], schedule: Schedule, channels: Channels) -> None:
        self.stages, self.schedule, self.channels = stages, schedule, channels
        programs = with_transfers(schedule)
        self.program, self._slots = programs[channels.rank], max(map(messages_at_once, programs))
        self._inbox_is_open = False
        self._forwards: dict[int, Sequence[Action | Transfer]] = {}

    @property
    def last(self) -> int:
        """The number of the stage that returns the loss."""
        return len(self.schedule.placement) - 1

    def forward_backward(self, batches: Sequence[Batch], *, scale: Tensor) -> Tensor:
        """Forward and backward of a step's micro-batches, which are the same on every rank; gradients gather.

        scale  0-d, what the loss sum is multiplied by before backward: 1 / (valid tokens of the whole global batch)

        Returns the micro-batches' losses, scaled and summed, 0-d: this rank's part of the global mean loss, 0 where it
        does not hold the last stage. Raises ValueError for another number of micro-batches than the schedule's.
        """
        count = self.schedule.micro_batches
        if len(batches) != count:
            raise ValueError(
                f"forward_backward: {len(batches)} micro-batches, but {self.schedule.name} is made for {count}"
            )
        self._open_inbox(batches[0])
        return _sum(self._run(self.program, batches, scale), like=scale)

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch], *, scale: Tensor) -> Tensor:
        """The same without backward, of any number of micro-batches."""
        return _sum(self._run(self._forward_program(len(batches)), batches, scale), like=scale)

    @torch.no_grad()
    def output(self, batch: Batch) -> Tensor | None:
        """What the last stage makes of one batch, whatever that is; None where this rank does not hold it."""
        return next(iter(self._run(self._forward_program(1), [batch], None)), None)

    def _open_inbox(self, batch: Batch) -> None:
        """Once, make room for what passes between stages in training, where GPUs write to each other."""
        if self._inbox_is_open:
            return
        self._inbox_is_open = True
        messages = [forms for stage in self.stages.values() for forms in (stage.takes(batch), stage.gives(batch))]
        nbytes = max(prod(form.shape) * form.dtype.itemsize for forms in messages for form in forms)
        self.channels.open_inbox(slots=(self._slots + 1) * max(map(len, messages)), nbytes=nbytes)

    def _forward_program(self, micro_batches: int) -> Sequence[Action | Transfer]:
        if micro_batches not in self._forwards:
            schedule = forward_only(self.schedule.placement, micro_batches=micro_batches)
            self._forwards[micro_batches] = with_transfers(schedule)[self.channels.rank]
        return self._forwards[micro_batches]

    def _run(
        self, program: Sequence[Action | Transfer], batches: Sequence[Batch], scale: Tensor | None
    ) -> list[Tensor]:
        run = _Run(self.stages, batches, last=self.last, channels=self.channels, scale=scale)
        for step in program:
            run.does[step.kind](step)
        self.channels.flush()
        return run.results


class _Run:
    """One run of a program: what was made and is still needed."""

    def __init__(
        self,
        stages: Mapping[int, Stage],
        batches: Sequence[Batch],
        *,
        last: int,
        channels: Channels,
        scale: Tensor | None,
    ) -> None:
        self.stages, self.batches, self.last, self.channels, self.scale = stages, batches, last, channels, scale
        self.results: list[Tensor] = []
        self.arriving: dict[Key, Receipt] = {}
        self.leaving: dict[Key, Tensors] = {}
        self.kept: dict[tuple[int, int], tuple[Tensors, Tensors]] = {}  # (stage, micro-batch) -> inputs and outputs
        self.does = {"F": self.forward, "B": self.backward, "SEND": self.send, "POST": self.post}

    def forward(self, action: Action) -> None:
        """Run a stage on the output of the one before."""
        stage, i = action.stage, action.micro_batch
        x: Tensors = () if stage == 0 else self.arriving.pop(("activation", stage - 1, i)).wait()
        for tensor in _floating(x):
            tensor.requires_grad_(torch.is_grad_enabled())
        y = _tuple(self.stages[stage](_plain(x), self.batches[i]))
        if stage == self.last:
            y = y if self.scale is None else (y[0] * self.scale,)
            self.results.append(y[0].detach())
        else:
            self.hand_over(("activation", stage, i), tuple(tensor.detach() for tensor in y), to=stage + 1)
        if torch.is_grad_enabled():
            self.kept[stage, i] = x, y

    def backward(self, action: Action) -> None:
        """Run a stage's backward on the gradient of its output."""
        stage, i = action.stage, action.micro_batch
        x, y = self.kept.pop((stage, i))
        if stage == self.last:
            torch.autograd.backward(y)
        else:
            gradients = self.arriving.pop(("gradient", stage + 1, i)).wait()
            pairs = [(t, g) for t, g in zip(_floating(y), gradients, strict=True) if t.requires_grad]
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        if stage > 0:
            made = tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in _floating(x))
            self.hand_over(("gradient", stage, i), made, to=stage - 1)

    def hand_over(self, key: Key, made: Tensors, *, to: int) -> None:
        """Keep what a stage made for the stage beside it: on this rank, or until it is sent."""
        if to in self.stages:
            self.arriving[key] = Receipt(made, [])
        else:
            self.leaving[key] = made

    def send(self, transfer: Transfer) -> None:
        """Send what was kept to leave."""
        key = (transfer.what, transfer.stage, transfer.micro_batch)
        self.channels.send(self.leaving.pop(key), to=transfer.peer)

    def post(self, transfer: Transfer) -> None:
        """Begin to receive what an action will need."""
        batch = self.batches[transfer.micro_batch]
        if transfer.what == "activation":
            forms = self.stages[transfer.stage + 1].takes(batch)
        else:
            forms = tuple(f for f in self.stages[transfer.stage - 1].gives(batch) if f.dtype.is_floating_point)
        key = (transfer.what, transfer.stage, transfer.micro_batch)
        self.arriving[key] = self.channels.receive(forms, source=transfer.peer)


def _sum(losses: list[Tensor], *, like: Tensor) -> Tensor:
    return torch.stack(losses).sum() if losses else torch.zeros_like(like)


def _floating(tensors: Tensors) -> Tensors:
    return tuple(tensor for tensor in tensors if tensor.is_floating_point())


def _tuple(y: Tensor | Tensors) -> Tensors:
    return (y,) if isinstance(y, Tensor) else y


def _plain(x: Tensors) -> Tensor | Tensors | None:
    """What a stage is called with: nothing, one tensor, or several."""
    return x[0] if len(x) == 1 else x or None
