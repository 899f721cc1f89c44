"""What all blocks of one micro-batch need alike, computed once and passed beside the activations."""

from typing import NamedTuple

from torch import Tensor


class Shared(NamedTuple):
    """Tensors about the tokens of a micro-batch; None where the model has no use for them.

    sequence_length  tokens in each sequence, S
    cos, sin         [T, 1, E/2] rotary angles
    keys             [T] int64, a dropout key for each token
    local_keys       [T], or [T/tp] under sequence parallelism: the keys of the tokens held between cut layers
    """

    sequence_length: int
    cos: Tensor | None = None
    sin: Tensor | None = None
    keys: Tensor | None = None
    local_keys: Tensor | None = None
