"""What every model shape answers: its sizes under one name each, its exact parameters, its arithmetic."""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Self


class Shape(ABC):
    """The torch-free twin of a model file. Fields are named as Hugging Face's; these names all shapes share."""

    WIDTH: ClassVar[str]  # the field behind `width`, for messages
    HEADS: ClassVar[str]
    KV_HEADS: ClassVar[str]

    vocab_size: int

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Blocks."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Features of a token between blocks, D."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """Query heads, H."""

    @property
    @abstractmethod
    def kv_heads(self) -> int:
        """Key/value heads, K; fewer than `heads` when they are shared."""

    @property
    @abstractmethod
    def ffn_width(self) -> int:
        """Features inside the MLP."""

    @property
    @abstractmethod
    def max_positions(self) -> int:
        """The longest sequence that the shape names."""

    @property
    @abstractmethod
    def tied(self) -> bool:
        """Whether the output projection is the token embedding."""

    @property
    @abstractmethod
    def matmul_parameters_per_layer(self) -> int:
        """Weights of one block that multiply each token."""

    @abstractmethod
    def parameter_count(self, vocab_size: int | None = None) -> int:
        """Exactly how many parameters, over the true vocabulary (this shape's, or the one given)."""

    @classmethod
    @abstractmethod
    def from_hf(cls, config_json: dict[str, Any]) -> Self:
        """The shape that a Hugging Face `config.json` describes. Raises ConfigError for what is not built here."""

    @abstractmethod
    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `transformers` reads."""

    @property
    def head_dim(self) -> int:
        """Features of one head, E."""
        return self.width // self.heads

    def with_vocab_size(self, vocab_size: int) -> Self:
        """The same shape over another vocabulary."""
        return replace(self, vocab_size=vocab_size)  # pyright: ignore[reportArgumentType]

    def known_vocab_size(self, vocab_size: int | None = None) -> int:
        """`vocab_size` if given, else this shape's. Raises ValueError while it is -1, not yet taken from the data."""
        size = self.vocab_size if vocab_size is None else vocab_size
        if size < 1:
            raise ValueError("vocab_size is -1, to be taken from the data; use with_vocab_size first")
        return size

    def flops_per_sequence(self, sequence_length: int) -> float:
        """Operations of forward and backward, attention counted in full as Nanotron and torchtitan do.

        3 x 2 per weight and token, and 3 x 4 per position pair, feature and layer (scores, weighted sum).
        """
        return self._flops(sequence_length, pairs=sequence_length**2)

    def causal_flops_per_sequence(self, sequence_length: int) -> float:
        """The same with half of the attention: what a causal kernel has to do."""
        return self._flops(sequence_length, pairs=sequence_length**2 / 2)

    def recomputed_flops_per_sequence(self, sequence_length: int) -> float:
        """Operations of all blocks' forward, which recomputing whole blocks adds to a step."""
        return self._blocks_forward(sequence_length, pairs=sequence_length**2)

    def _flops(self, sequence_length: int, *, pairs: float) -> float:
        head = 2.0 * sequence_length * self.known_vocab_size() * self.width
        return 3.0 * (self._blocks_forward(sequence_length, pairs=pairs) + head)

    def _blocks_forward(self, sequence_length: int, *, pairs: float) -> float:
        per_layer = 2.0 * sequence_length * self.matmul_parameters_per_layer + 4.0 * pairs * self.width
        return self.num_layers * per_layer
