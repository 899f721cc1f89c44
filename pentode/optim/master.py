"""Master weights: the buffers that hold all weights and gradients, how gradients get there and weights come back.

Design 1.9. The buffers themselves are made in `optim/flat.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from pentode.dist.collectives import start_join_, start_sum_, start_sum_and_split_, sum_
from pentode.dist.mesh import Axis
from pentode.ops.gradient_sum import GradientSum, put_beside
from pentode.optim.flat import Shard, alike, flatten
from pentode.optim.groups import Group
from pentode.optim.layout import Layout, block_of
from pentode.optim.moving import move

TOGETHER = 1 << 22  # elements up to which gradients are moved with others: a copy of more fills a GPU by itself
WAITING = 1 << 26  # elements that may wait for others: they take room
COALESCE = 1 << 20  # elements up to which partial sums travel in one message; a copy of more costs more than a message


@dataclass
class _Bucket:
    """Parameters whose gradients are reduced together, and whose weights come back together.

    missing   parameters that still wait for micro-batches of this step
    arriving  the weights of other ranks on their way here
    """

    names: tuple[str, ...]
    model: Tensor
    gradient: Tensor
    missing: int = 0
    arriving: torch.distributed.Work | None = None


class MasterWeights:
    """All parameters of this rank in flat buffers, of which it steps all (ZeRO-0), or 1 / data.size (ZeRO-1).

    shards  what this rank steps, in the order in which the next forward needs it
    shapes  of this rank's part of each parameter, by name

    parameters     by name, in the model's order; each becomes a view of the model buffer and keeps its values
    groups         which parameters are stepped alike; every name is in one group
    data           the axis that gradients are summed over
    bucket_bytes   gradient bytes from which a bucket is full and reduced on its own
    accumulate_in  dtype of the gradients, where the parameter's own is not wider
    zero_stage     1: master weights and optimizer states are cut over `data` (arXiv:1910.02054, section 5.1)
    unmoved_from   elements from which a parameter's gradient stays where backward makes it; None: all are moved. Only
                   where each step has one micro-batch, and `data` one rank

    As soon as backward has made a parameter's gradient it is moved into its place in the gradient buffer, and `.grad`
    is None again: the step's first micro-batch writes, later ones add. Those of up to TOGETHER elements wait for each
    other, at most until their bucket is complete, and are moved by few calls. To a larger one that is float32 or
    wider, an operator may add in its own backward (`ops/gradient_sum.py`), so that there is nothing to move. Where a
    step has one micro-batch, those from `unmoved_from` on stay where they are until the next step begins: that saves a
    copy, and room while the next forward needs it. A bucket whose last gradient has arrived is reduced while backward
    goes on: all-reduced, or reduce-scattered under ZeRO-1, where the weights that other ranks stepped then come back
    bucket by bucket while the next forward goes on.

    Masters are float32 (float64 for float64 parameters) whatever gradients are accumulated in. Nanotron without
    `accumulate_grad_in_fp32` has none and steps bfloat16 weights directly, which loses most small updates.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        groups: Sequence[Group],
        data: Axis,
        bucket_bytes: int,
        accumulate_in: torch.dtype,
        zero_stage: int = 0,
        unmoved_from: int | None = None,
    ) -> None:
        assert unmoved_from is None or data.size == 1, "gradients that are reduced lie in buckets"
        self.data = data
        self.sharded = zero_stage > 0 and data.size > 1
        over = data if self.sharded else Axis("data")
        self.flat = [
            flatten(part, decay, shards=over, bucket_bytes=bucket_bytes, accumulate_in=accumulate_in, unmoved=unmoved)
            for part, decay, unmoved in alike(parameters, groups, unmoved_from=unmoved_from)
        ]
        assert all(flat.moves_gradients or not flat.partial for flat in self.flat), "partial sums lie in buckets"
        self.gradients: dict[str, Tensor] = {}
        self._unmoved: dict[str, Shard] = {}
        buckets: list[_Bucket] = []
        for flat in self.flat:
            if flat.moves_gradients:
                self.gradients |= flat.layout.views(flat.gradient)
            else:
                self._unmoved |= dict(zip(flat.layout.starts, flat.shards, strict=True))
            cut = zip(flat.layout.buckets, flat.layout.cut(flat.model), flat.layout.cut(flat.gradient), strict=True)
            buckets += [_Bucket(bucket.names, model, gradient) for bucket, model, gradient in cut]
        # Ranks must reduce in one order: backward's, where a bucket waits for the first of its parameters in the model.
        places = {name: i for i, name in enumerate(parameters)}
        self._buckets = sorted(buckets, key=lambda bucket: -places[bucket.names[0]])
        self._of_block: dict[str, list[_Bucket]] = {}
        for bucket in self._buckets:
            for block, _ in groupby(bucket.names, key=block_of):
                self._of_block.setdefault(block, []).append(bucket)
        self.shards, self._layouts, self._bucket_of = self._in_order()
        self._partial_gradients = [part for flat in self.flat for part in flat.partial_gradients()]
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._sums: dict[str, GradientSum] = {
            name: put_beside(parameters[name], total)
            for name, total in self.gradients.items()
            if total.numel() > TOGETHER and total.dtype == torch.promote_types(total.dtype, torch.float32)
        }
        self._arrivals = dict.fromkeys(parameters, 0)
        self._waiting: dict[str, Tensor] = {}  # gradients that are not in their places yet
        self._waiting_elements = 0
        self._waiting_add = False  # whether they are to be added to what is there
        self._micro_batches = 0
        self._works: list[torch.distributed.Work] = []
        self._started = 0
        for bucket in self._buckets:
            for name in bucket.names:
                parameters[name].register_post_accumulate_grad_hook(self._receiver(name, bucket))

    @property
    def shares_storage(self) -> bool:
        """Whether the master weights are the model's weights, so that there is nothing to round."""
        return all(flat.shares_storage for flat in self.flat)

    def own_gradients(self) -> list[Tensor]:
        """The gradients that this rank counts in the norm, when `finish_gradients` has returned."""
        return [gradient for flat in self.flat for gradient in flat.own_gradients()]

    def by_name(self, tensors: Sequence[Tensor]) -> dict[str, list[tuple[int, Tensor]]]:
        """Tensors that lie beside the shards, one for each, cut by parameter.

        For each name: where a run of its elements begins in the flattened parameter of this rank, and a view of them.
        """
        found: dict[str, list[tuple[int, Tensor]]] = {}
        for layout, shard, tensor in zip(self._layouts, self.shards, tensors, strict=True):
            for name, begin, at, length in layout.ranges(shard.start, shard.stop):
                found.setdefault(name, []).append((begin, tensor[at : at + length]))
        return found

    def start_step(self, micro_batches: int, *, loss_scale: Tensor | None = None) -> None:
        """Expect gradients of this many micro-batches; the last step's gradients are given up.

        loss_scale  0-d: the gradient that each of their backwards gives the loss, where that is known. Each forward
                    until `finish_gradients` must then have its backward
        """
        self._micro_batches = micro_batches
        self._arrivals = dict.fromkeys(self._arrivals, 0)
        self._forget_waiting()
        self._started = 0
        for found in self._sums.values():
            found.start_step(loss_scale)
        for name, shard in self._unmoved.items():
            shard.gradient = shard.gradient.new_empty(0)
            self.gradients.pop(name, None)
        for bucket in self._buckets:
            bucket.missing = len(bucket.names)

    def finish_gradients(self) -> None:
        """Complete the shards' gradients: zero for what got none, and the sum over all ranks for the rest."""
        for found in self._sums.values():
            found.finish_step()
        for name, count in self._arrivals.items():
            if count == 0:
                self._receive_nothing(name)
        for bucket in self._buckets:
            bucket.missing = 0
        self._move_waiting()
        self._start_complete()
        for work in self._works:
            work.wait()
        self._works.clear()
        self._finish_partial_sums()

    def missing(self) -> list[str]:
        """The parameters that got no gradient in this step, not even one of zeros."""
        return [name for name, count in self._arrivals.items() if count == 0]

    def send(self, shard: Shard) -> None:
        """Begin to give the model's weights of a shard, which are new, to the ranks that do not make them.

        `wait_for` tells when a block's are there.
        """
        if self.sharded:
            bucket = self._bucket_of[shard]
            bucket.arriving = start_join_(bucket.model, self.data)

    def wait_for(self, block: str | None = None) -> None:
        """Return when the model's weights of a block ("layers.3", "embed"), or of all, are the newest."""
        for bucket in self._buckets if block is None else self._of_block.get(block, ()):
            if bucket.arriving is not None:
                bucket.arriving.wait()
                bucket.arriving = None

    @torch.no_grad()
    def set(self, name: str, values: Tensor) -> None:
        """Give a parameter new values, in this rank's shape of it; the master weights take them unrounded."""
        flat = next(flat for flat in self.flat if name in flat.layout.starts)
        flat.layout.views(flat.model)[name].copy_(values)
        for shard in flat.shards:
            for part in flat.layout.ranges(shard.start, shard.stop):
                if part.name == name:
                    source = values.flatten()[part.in_parameter : part.in_parameter + part.length]
                    shard.weight[part.in_part : part.in_part + part.length].copy_(source)

    def bytes(self) -> int:
        """Memory held by weights, master weights and gradients."""
        buffers = sum(flat.model.nbytes + flat.gradient.nbytes for flat in self.flat)
        return buffers + sum(
            shard.weight.nbytes for flat in self.flat if not flat.shares_storage for shard in flat.shards
        )

    def _in_order(self) -> tuple[list[Shard], list[Layout], dict[Shard, _Bucket]]:
        """The shards as the next forward needs them, so that what it needs first is sent first; the layout of each.

        And the bucket of each, where a shard is a part of one.
        """
        bucket_of: dict[Shard, _Bucket] = {}
        layouts: dict[Shard, Layout] = {}
        by_names = {bucket.names: bucket for bucket in self._buckets}
        for flat in self.flat:
            layouts |= dict.fromkeys(flat.shards, flat.layout)
            if self.sharded:
                buckets = [by_names[bucket.names] for bucket in flat.layout.buckets]
                bucket_of |= dict(zip(flat.shards, buckets, strict=True))
        turns = {bucket.names: turn for turn, bucket in enumerate(reversed(self._buckets))}
        shards = sorted(bucket_of, key=lambda shard: turns[bucket_of[shard].names]) or list(layouts)
        return shards, [layouts[shard] for shard in shards], bucket_of

    def _receiver(self, name: str, bucket: _Bucket) -> Callable[[Tensor], None]:
        """The hook that autograd calls with the parameter, once per backward, when its gradient is complete."""

        def receive(parameter: Tensor) -> None:
            count = self._arrivals[name] = self._arrivals[name] + 1
            expected = self._micro_batches
            assert count <= expected, f"{name}: gradient {count} of a step of {expected} micro-batches; call start_step"
            gradient = parameter.grad
            if gradient is None:  # the hook fires for a gradient that is None, too
                if count == 1:
                    self._receive_nothing(name)
            elif name in self._sums:
                move([self.gradients[name]], [gradient], add=self._sums[name].begin())
            elif name in self._unmoved:
                self._keep(name, gradient)
            elif gradient.numel() <= TOGETHER:
                self._wait(name, gradient, add=count > 1)
            else:
                move([self.gradients[name]], [gradient], add=count > 1)
            parameter.grad = None
            if count == expected:
                bucket.missing -= 1
                if not bucket.missing:
                    self._move_waiting()
                    self._start_complete()

        return receive

    def _wait(self, name: str, gradient: Tensor, *, add: bool) -> None:
        """Have a gradient wait for others that are to be written, or to be added, as it is."""
        full = self._waiting_elements + gradient.numel() > WAITING
        if full or name in self._waiting or add != self._waiting_add:
            self._move_waiting()
        self._waiting[name], self._waiting_add = gradient, add
        self._waiting_elements += gradient.numel()

    def _move_waiting(self) -> None:
        """Move the gradients that wait into their places."""
        if self._waiting:
            places = [self.gradients[name] for name in self._waiting]
            move(places, list(self._waiting.values()), add=self._waiting_add)
            self._forget_waiting()

    def _forget_waiting(self) -> None:
        self._waiting.clear()
        self._waiting_elements = 0

    def _receive_nothing(self, name: str) -> None:
        """Have zeros where a parameter got no gradient, and nothing has added to its sum."""
        if name in self._unmoved:
            self._keep(name, torch.zeros_like(self._unmoved[name].model).view(self.shapes[name]))
        elif name not in self._sums or not self._sums[name].begin():
            self.gradients[name].zero_()

    def _keep(self, name: str, gradient: Tensor) -> None:
        """Let a parameter's gradient be this tensor."""
        assert self._micro_batches == 1, f"{name}: its gradient is not moved, so it cannot be added to another"
        self.gradients[name] = gradient
        self._unmoved[name].gradient = gradient.contiguous().view(-1)

    def _start_complete(self) -> None:
        """Start to reduce the buckets that are complete, but none before its turn."""
        start = start_sum_and_split_ if self.sharded else start_sum_
        while self._started < len(self._buckets) and not self._buckets[self._started].missing:
            work = start(self._buckets[self._started].gradient, self.data)
            if work is not None:
                self._works.append(work)
            self._started += 1

    def _finish_partial_sums(self) -> None:
        """Add up, on the shards, the gradients of which several ranks hold parts: the small ones in one message."""
        small: dict[str, tuple[Axis, list[Tensor]]] = {}
        for gradient, axis in self._partial_gradients:
            if gradient.numel() > COALESCE:
                sum_(gradient, axis)
            else:
                small.setdefault(axis.name, (axis, []))[1].append(gradient)
        for axis, gradients in small.values():
            total = sum_(torch.cat(gradients), axis)
            for gradient, found in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(found)
