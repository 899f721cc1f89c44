"""Sums of large gradients: what adds to one in its own backward spares a tensor of the weight's size, made and read."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class GradientSum:
    """The gradient of a weight in this step, over its micro-batches so far.

    total  in the weight's shape; where the step has not begun it, whatever was there before

    Who adds to it gives autograd no gradient of that weight, which is the optimizer's from then on: `autograd.grad` of
    it would find none. `optim/master.py` puts it beside each weight that is large enough, says when a step starts, and
    learns from autograd's hook, which is called for a gradient that is None, too, that a backward has done with the
    weight.
    """

    total: Tensor
    begun: bool = False

    def start_step(self) -> None:
        """Take what is there for the last step's."""
        self.begun = False

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
