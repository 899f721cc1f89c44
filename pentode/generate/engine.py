"""Writes tokens one after another with a key/value cache: a prompt is read once, then each step reads one token.

B sequences of equal length, S tokens in each, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pentode.dist.collectives import broadcast_
from pentode.dist.mesh import Mesh
from pentode.dist.p2p import Channels, Form, connect
from pentode.generate.sampling import Sampling, next_tokens
from pentode.nn.cache import Cache
from pentode.nn.causal_lm import CausalLM
from pentode.parallel.batch import Batch
from pentode.parallel.pipeline.runner import Pipeline
from pentode.parallel.pipeline.schedules import forward_only


@dataclass(frozen=True)
class Speaker:
    """A model that writes: all of it, or this rank's stages, by number, of one that several ranks hold together."""

    stages: Mapping[int, CausalLM]
    mesh: Mesh
    channels: Channels
    placement: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, model: "CausalLM | Speaker") -> "Speaker":
        """A model in one process, or what is a speaker already."""
        if isinstance(model, Speaker):
            return model
        mesh = Mesh.single()
        return cls({0: model}, mesh, connect(mesh.pp, device=model.place.device))

    @property
    def vocab_size(self) -> int:
        """How many tokens the model knows."""
        return next(iter(self.stages.values())).vocab.size

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """While this lasts, nothing is dropped out and no sequence is cut."""
        with ExitStack() as stack:
            for stage in self.stages.values():
                stack.callback(stage.train, stage.training)
                stack.enter_context(stage.place.without_sequence_parallelism())
                stage.eval()
            yield

    def reader(self, rows: int, capacity: int) -> "Reader":
        """A reader of `rows` sequences of up to `capacity` tokens, none of them read yet."""
        stages = {n: _CachedStage(stage, stage.empty_cache(rows, capacity)) for n, stage in self.stages.items()}
        return Reader(Pipeline(stages, forward_only(self.placement, micro_batches=1), self.channels))


class Reader:
    """Reads sequences piece by piece and says what may come next."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.length = 0

    def logits(self, tokens: Tensor) -> Tensor | None:
        """Logits [B, V] after the sequences so far and `tokens` [B, S]; None where the last stage is elsewhere."""
        rows, length = tokens.shape
        positions = torch.arange(self.length, self.length + length, device=tokens.device).expand(rows, length)
        self.length += length
        samples = torch.arange(rows, device=tokens.device)
        return self.pipeline.output(Batch(tokens.flatten(), tokens.flatten(), positions.flatten(), samples))


@dataclass(frozen=True)
class _CachedStage:
    """A pipeline stage that reads on where it stopped, and whose last one gives logits in place of a loss."""

    model: CausalLM
    cache: Cache

    def __call__(self, x: Tensor | None, batch: Batch) -> Tensor:
        return self.model.logits(x, batch, self.cache, last_only=True)

    def takes(self, batch: Batch) -> tuple[Form, ...]:
        return self.model.takes(batch)

    def gives(self, batch: Batch) -> tuple[Form, ...]:
        return self.model.gives(batch)


@torch.no_grad()
def generate(
    model: CausalLM | Speaker, tokens: Tensor, *, sampling: Sampling, max_positions: int, eos_id: int | None = None
) -> Tensor:
    """Continue `tokens` [B, S], at least one each, on the model's device -> [B, S + n], n <= max_new_tokens.

    Ends when every sequence has drawn `eos_id`, which also fills up those that ended before the others. Of a text
    longer than `max_positions` the end is read; one that outgrows them is read again from its last half, so that
    generation never ends for that. Where several ranks hold the model, all of them call and all get the same tokens.
    """
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(
            f"generate: tokens are {list(tokens.shape)}; give [sequences, tokens], at least one token each"
        )
    speaker = Speaker.of(model)
    least, most = (int(end) for end in tokens.aminmax())
    if least < 0 or most >= speaker.vocab_size:
        odd = least if least < 0 else most
        raise ValueError(f"generate: token id {odd} is beyond the model's vocabulary of {speaker.vocab_size}")
    with speaker.speaking():
        return _continue(speaker, tokens, sampling, max_positions, eos_id)


def _continue(speaker: Speaker, tokens: Tensor, sampling: Sampling, max_positions: int, eos_id: int | None) -> Tensor:
    rows = tokens.shape[0]
    generator = torch.Generator(tokens.device).manual_seed(sampling.seed)
    ended = torch.zeros(rows, dtype=torch.bool, device=tokens.device)
    first_of_last = speaker.placement[-1] * speaker.mesh.tp.size  # of the ranks of the last stage; its draw counts
    reader, unread = None, tokens[:, -max_positions:]
    for left in range(sampling.max_new_tokens, 0, -1):
        if reader is not None and reader.length == max_positions:
            reader, unread = None, tokens[:, -max(max_positions // 2, 1) :]
        if reader is None:
            reader = speaker.reader(rows, min(unread.shape[1] + left - 1, max_positions))  # the last is never read
        logits = reader.logits(unread)  # [B, V]
        drawn = tokens.new_empty(rows)  # [B]
        if logits is not None:
            drawn = next_tokens(logits, sampling=sampling, generator=generator)
        broadcast_(drawn, speaker.mesh.model, source=first_of_last)
        if eos_id is not None:
            drawn = drawn.masked_fill(ended, eos_id)
            ended |= drawn == eos_id
        unread = drawn[:, None]
        tokens = torch.cat((tokens, unread), dim=1)
        if eos_id is not None and bool(ended.all()):
            break
    return tokens
