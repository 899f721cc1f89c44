"""Steps of one GPU, recorded once and replayed: the host then launches a graph and not a thousand kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pentode import device as devices
from pentode import log
from pentode.errors import ConfigError
from pentode.ops import flash, fused_products
from pentode.parallel.batch import Batch
from pentode.run.build import Run
from pentode.train.step import StepResult, at_once, train_step

WARM_UP = 3  # steps done as they are, in which everything is compiled and memory finds its size
TIMED = 5  # steps then timed of either form, the fastest of which counts


@dataclass
class _Recorded:
    """A step, and the memory it reads and writes each time."""

    graph: devices.Graph
    batches: Sequence[Tensor]  # the buffers of its own
    learning_rate: Tensor
    result: StepResult
    rate: float | None = None  # what `learning_rate` holds


class Steps:
    """Does a run's steps: as `train_step` does, or by replaying one that was recorded.

    Replayed are those of a GPU that trains alone, where the config asks for it; or by itself, if a step needs less than
    half of the memory, which a recorded one keeps to itself, and if replaying turns out faster: it is the host that
    small models wait for. Not by itself with `general.deterministic`.

    before_update  see `train_step`; a recorded step, which cannot wait in its middle, is begun after it
    """

    def __init__(self, run: Run, *, before_update: Callable[[], object] = at_once) -> None:
        self.run, self.before_update = run, before_update
        self._left = WARM_UP
        self._recorded: _Recorded | None = None
        self._given_anew: devices.Watch | None = None
        self._replayed: devices.Watch | None = None
        gpu, asked = devices.is_gpu(run.device), run.config.model.cuda_graph
        if asked == "on" and not gpu:
            raise ConfigError(["model.cuda_graph: on, but torch finds no GPU here; use auto, or off"])
        alone = gpu and run.mesh.world.size == 1 and run.config.general.ignore_sanity_checks
        # A library may choose another kernel for a step that is recorded; a resumed run would record another step.
        same_bits = run.config.general.deterministic
        self._wanted = "off" if not alone or (same_bits and asked == "auto") else asked
        self._asked = self._wanted  # off once it has turned out not to pay
        self._last: Sequence[Batch] | None = None

    def do(self, batches: Sequence[Batch], *, learning_rate: float) -> StepResult:
        """The next step, of batches that are still with the host. Its numbers stay until the next one begins."""
        if self._last is not None and not _alike(self._last, batches):  # a stage with other lengths begins
            self._recorded, self._left, self._asked = None, WARM_UP, self._wanted
            self._given_anew = self._replayed = None
        self._last = batches
        if self._recorded is None and self._is_time():
            self._recorded = self._try_to_record(batches)
        if self._recorded is not None:
            result = self._replay(self._recorded, batches, learning_rate)
        else:
            self._left -= 1
            moved = [batch.to(self.run.device) for batch in batches]
            result = train_step(self.run, moved, learning_rate=learning_rate, before_update=self.before_update)
        if self._asked == "auto" and self._left <= 0:
            self._compare()
        return result

    def _is_time(self) -> bool:
        """Whether to record: enough steps were done, and timed if it is not known that it pays."""
        timed = self._asked == "on" or (self._given_anew is not None and len(self._given_anew) > TIMED)
        if self._asked == "auto" and (self._left == 0 or timed) and not self._is_small():
            self._asked = "off"
        return self._asked != "off" and self._left <= 0 and timed

    def _compare(self) -> None:
        """Time this step; when enough of both forms were, give the recording up if it is the slower one."""
        if self._recorded is None:
            self._given_anew = self._given_anew or devices.Watch(self.run.device)
            self._given_anew.mark()
            return
        self._replayed = self._replayed or devices.Watch(self.run.device)
        if len(self._replayed) > TIMED:
            return
        self._replayed.mark()
        if len(self._replayed) > TIMED and self._given_anew is not None:
            replayed, given_anew = self._replayed.fastest(), self._given_anew.fastest()
            if replayed > given_anew:
                log.info(
                    f"A replayed step takes {replayed:.2f} ms, one given anew {given_anew:.2f}: it is from here on"
                )
                self._recorded, self._asked = None, "off"

    def _is_small(self) -> bool:
        """Whether the memory is there, and the host may be waited for: where attention or products are large, not."""
        peak, device = devices.memory(self.run.device).peak_allocated, self.run.device
        room = min(devices.total_memory(device) / 2, devices.free_memory(device))
        return peak < room and not any(one.is_loaded(device) for one in (flash.PACKAGE, fused_products.PACKAGE))

    def _try_to_record(self, batches: Sequence[Batch]) -> _Recorded | None:
        """A recorded step; None where it cannot be and need not: recording does nothing, so nothing is lost."""
        try:
            return self._record(batches)
        except RuntimeError as error:
            if self._asked == "on":
                raise
            reason = str(error).splitlines()[0]
            log.warning(f"model.cuda_graph: a step could not be recorded, each is given to the GPU anew ({reason})")
            self._asked = "off"
            return None

    def _record(self, batches: Sequence[Batch]) -> _Recorded:
        log.info("Recording a step, to replay it from here on")
        own = [batch.to(self.run.device).packed() for batch in batches]
        learning_rate = torch.zeros((), dtype=torch.float64, device=self.run.device)
        graph = devices.Graph()
        with graph.recording():
            result = train_step(self.run, own, learning_rate=learning_rate)
        return _Recorded(graph, [batch.buffer() for batch in own], learning_rate, result)

    def _replay(self, recorded: _Recorded, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        for own, batch in zip(recorded.batches, batches, strict=True):
            own.copy_(batch.buffer(), non_blocking=True)
        if learning_rate != recorded.rate:
            recorded.learning_rate.fill_(learning_rate)
            recorded.rate = learning_rate
        self.before_update()
        recorded.graph.replay()
        return recorded.result


def _alike(some: Sequence[Batch], others: Sequence[Batch]) -> bool:
    return [(b.tokens.shape, b.samples.shape) for b in some] == [(b.tokens.shape, b.samples.shape) for b in others]
