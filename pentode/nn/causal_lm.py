"""What every causal language model shares: the walk from tokens to the loss, whole or by pipeline part.

T tokens, D width, B sequences.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pentode.dist.p2p import Form
from pentode.nn.cache import Cache
from pentode.nn.dropout import Dropout
from pentode.nn.shared import Shared
from pentode.ops.dropout import token_keys
from pentode.ops.rope import angles
from pentode.parallel.batch import Batch
from pentode.parallel.loss import Vocab, vocab_logits, vocab_loss
from pentode.parallel.tensor import Place, VocabEmbedding, VocabTable


@dataclass(frozen=True)
class Part:
    """What one pipeline stage holds of the model: some layers, the embedding if first, the loss if last."""

    layers: range
    first: bool
    last: bool

    @classmethod
    def whole(cls, layers: int) -> "Part":
        """The only stage there is."""
        return cls(range(layers), first=True, last=True)


@dataclass(frozen=True)
class Ends:
    """The modules before and after the blocks; None where this part, or this kind of model, has none of them.

    `head` is None where the output layer is tied to `embed`, of which first and last part then hold a copy each. On
    two stages, each copy's gradient is a partial sum over the two (`VocabTable`).
    """

    embed: VocabEmbedding | None
    positions: nn.Module | None
    norm: nn.Module | None
    head: VocabTable | None


def run_block(block: nn.Module, x: Tensor, shared: Shared) -> Tensor:
    """Apply one block. `CausalLM.run_block` may be set to this function compiled: one graph serves all equal blocks."""
    return block(x, shared)


def _nothing(name: str) -> None:
    """What is done before a block is used, unless its weights are still on their way."""


class CausalLM(nn.Module):
    """A language model, or the part of it that a pipeline stage holds. Layers keep their global number in their name.

    Dropout acts only in training mode; its masks follow from `dropout_seed`, samples and positions. `before_use` is
    called with "embed", "layers.3", ... before the weights of that name are used.
    """

    frequencies: Tensor | None
    dropout_seed: Tensor

    def __init__(
        self,
        *,
        part: Part,
        place: Place,
        width: int,
        vocab: Vocab,
        ends: Ends,
        layers: Mapping[int, nn.Module],
        frequencies: Tensor | None = None,
        embed_dropout: Dropout | None = None,
        z_loss: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.part, self.place, self.width, self.vocab, self.z_loss = part, place, width, vocab, z_loss
        self.embed, self.positions, self.embed_dropout = ends.embed, ends.positions, embed_dropout
        self.layers = nn.ModuleDict({str(number): layer for number, layer in layers.items()})
        self.norm, self.head = ends.norm, ends.head
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.register_buffer("dropout_seed", torch.tensor(seed, device=place.device), persistent=False)
        self.dropouts = any(isinstance(module, Dropout) and module.p > 0 for module in self.modules())
        self.run_block: Callable[[nn.Module, Tensor, Shared], Tensor] = run_block
        self.before_use: Callable[[str], None] = _nothing

    def forward(self, x: Tensor | None, batch: Batch) -> Tensor:
        """The batch's tokens, or the activations [T, D] of the part before, to activations, or to the loss (last part).

        The loss is 0-d, a sum over the tokens with a label; divide by their number over all ranks and micro-batches. In
        training it includes the z-loss, where the shape asks for one.
        """
        shared = self.shared(batch)
        x = self.embedded(batch, shared) if self.part.first else x
        for number, layer in self.layers.items():
            self.before_use(f"layers.{number}")
            x = self.run_block(layer, x, shared)
        if not self.part.last:
            return x
        self.before_use("norm")
        self.before_use("embed" if self.head is None else "head")
        x = self.place.enter(self.norm(x))  # [T, D]
        return vocab_loss(
            x, self.output_weight, batch.labels, vocab=self.vocab, z_loss=self.z_loss if self.training else 0.0
        )

    def logits(self, x: Tensor | None, batch: Batch, cache: Cache | None = None, *, last_only: bool = False) -> Tensor:
        """As `forward`, but the last part gives logits [T, vocabulary], or [B, vocabulary] of each sequence's end.

        With a cache, the batch holds only the tokens that follow those in it. Never compiled.
        """
        shared = self.shared(batch)
        x = self.embedded(batch, shared) if self.part.first else x
        for number, layer in self.layers.items():
            x = layer(x, shared, cache.layers[number] if cache is not None else None)
        if not self.part.last:
            return x
        x = self.place.enter(self.norm(x))
        if last_only:
            x = x.unflatten(0, (-1, batch.sequence_length))[:, -1]  # [B, D]
        return vocab_logits(x, self.output_weight, vocab=self.vocab)

    def takes(self, batch: Batch) -> tuple[Form, ...]:
        """What the part before gives for a batch: [T, D], or [T/tp, D] under sequence parallelism."""
        tokens = batch.tokens.numel() // (self.place.tp.size if self.place.sequence_parallel else 1)
        return (Form((tokens, self.width), self.place.dtype),)

    gives = takes  # every boundary between parts is alike

    def empty_cache(self, rows: int, capacity: int) -> Cache:
        """A cache for `rows` sequences of up to `capacity` tokens."""
        return Cache({number: layer.attn.empty_cache(rows, capacity) for number, layer in self.layers.items()})

    @property
    def output_weight(self) -> Tensor:
        """The output layer's rows held here, padding included: its own, or the embedding's."""
        return self.embed.weight if self.head is None else self.head.weight

    def shared(self, batch: Batch) -> Shared:
        """What the blocks need to know of the batch."""
        cos = sin = keys = local_keys = None
        if self.frequencies is not None:
            cos, sin = angles(batch.positions, self.frequencies)
        if self.training and self.dropouts:
            keys = token_keys(batch.samples, batch.positions, self.dropout_seed)
            local_keys = self.place.local_tokens(keys)
        return Shared(batch.sequence_length, cos, sin, keys, local_keys)

    def embedded(self, batch: Batch, shared: Shared) -> Tensor:
        """The first block's input.  # [T, D], or [T/tp, D] under sequence parallelism"""
        self.before_use("embed")
        x = self.embed(batch.tokens)
        if self.positions is not None:
            self.before_use("positions")
            x = x + self.positions(self.place.local_tokens(batch.positions))
        return x if self.embed_dropout is None else self.embed_dropout(x, shared.local_keys)
