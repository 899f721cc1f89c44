"""Sums of large gradients: what adds to one in its own backward spares a tensor of the weight's size, made and read."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class GradientSum:
    """The gradient of a weight in this step, over its micro-batches so far.

    total       in the weight's shape; where the step has not begun it, whatever was there before
    loss_scale  0-d: the gradient that backward will give the loss, the same in each of this step's micro-batches; None
                outside of a step, or where that is not known. The loss may then add to the sum in its forward

    Who adds to it gives autograd no gradient of that weight, which is the optimizer's from then on: `autograd.grad` of
    it would find none. `optim/master.py` puts it beside each weight that is large enough, says when a step starts, and
    learns from autograd's hook, which is called for a gradient that is None, too, that a backward has done with the
    weight.
    """

    total: Tensor
    begun: bool = False
    loss_scale: Tensor | None = None

    def start_step(self, loss_scale: Tensor | None) -> None:
        """Take what is there for the last step's."""
        self.begun, self.loss_scale = False, loss_scale

    def finish_step(self) -> None:
        """Have losses that are computed from now on add nothing in their forward."""
        self.loss_scale = None

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
