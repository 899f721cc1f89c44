"""Sums of large gradients: what adds to one in its own backward spares a tensor of the weight's size, made and read."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class GradientSum:
    """The gradient of a weight in this step, over its micro-batches so far.

    total  in the weight's shape; where the step has not begun it, whatever was there before

    Who adds to it gives autograd no gradient of that weight. It is the optimizer's (`optim/master.py`), which puts it
    beside each weight that is large enough, empties it when a step begins, and knows from autograd's hook, which is
    called for a gradient that is None too, that a backward has come to its end.
    """

    total: Tensor
    begun: bool = False

    def begin(self) -> bool:
        """Whether something of this step is there, to be added to and not overwritten; from now on there is."""
        begun, self.begun = self.begun, True
        return begun


def sum_of(weight: Tensor) -> GradientSum | None:
    """Where this weight's gradient is summed up; None where autograd is to be given it."""
    return getattr(weight, "gradient_sum", None)


def put_beside(weight: Tensor, total: Tensor) -> GradientSum:
    """Have a weight's gradients summed up there."""
    found = weight.gradient_sum = GradientSum(total)  # pyright: ignore[reportAttributeAccessIssue]
    return found
