"""Norm layers. They act on the tokens that a rank holds between cut layers, and every rank holds their weights whole.

x, y      [T, D], or [T/tp, D] under sequence parallelism
forward   nothing is moved
backward  nothing is moved
gradient  of x: complete; of weight and bias: complete | partial over tp, summed by the step (sum_over=tp)
"""

from torch import Tensor, nn

from pentode.ops.norm import beside_norm, layer_norm, rms_norm
from pentode.parallel.tensor import Place


class RMSNorm(nn.Module):
    """x over its root mean square, times a weight a feature."""

    def __init__(self, d: int, eps: float, *, place: Place) -> None:
        super().__init__()
        self.eps = eps
        self.weight = place.replicated(d, init="ones")

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def beside(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, or x + added, and its norm, for a stream that goes on beside it."""
        return beside_norm(x, self.weight, None, self.eps, added=added)


class LayerNorm(nn.Module):
    """x brought to mean 0 and variance 1, times a weight and plus a bias a feature."""

    def __init__(self, d: int, eps: float, *, place: Place) -> None:
        super().__init__()
        self.eps = eps
        self.weight = place.replicated(d, init="ones")
        self.bias = place.replicated(d, init="zeros")

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def beside(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, or x + added, and its norm, for a stream that goes on beside it."""
        return beside_norm(x, self.weight, self.bias, self.eps, added=added)
