"""The optimizers by name."""

from typing import Literal

from pydantic import Field

from pentode.config.section import Probability, section


@section
class AdamWOptimizerArgs:
    """Adam with decoupled weight decay (arXiv:1711.05101)."""

    adam_eps: float = Field(gt=0, description="added to the root of the second moment")
    adam_beta1: Probability = Field(description="decay of the first moment")
    adam_beta2: Probability = Field(description="decay of the second moment")
    torch_adam_is_fused: bool = Field(description="one fused kernel instead of an operation at a time; same formula")
    name: Literal["adamW"] = Field("adamW", description="the kind")


@section
class SGDOptimizerArgs:
    """Plain gradient descent with weight decay, no momentum."""

    name: Literal["sgd"] = Field("sgd", description="the kind")
