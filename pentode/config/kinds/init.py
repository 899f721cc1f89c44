"""Where the first weights come from."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pentode.config.section import section

KIND = "the kind; found by the other keys when left out"


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


@section
class RandomInit:
    """Normal numbers that do not depend on the layout; norms are one, biases zero."""

    type: Literal["random"] = Field("random", repr=False, description=KIND)
    std: float = Field(gt=0, description="standard deviation of all weights but those that write to the residual")
    scaling_method: Annotated[Literal["NONE", "NUM_LAYERS", "LAYER_INDEX", "MODEL_SCALE"], BeforeValidator(_upper)] = (
        Field("NUM_LAYERS", description="weights that write to the residual: std / sqrt(2 * layers), or NONE: std")
    )


@section
class SpectralMupInit:
    """Spectral muP (arXiv:2310.17813)."""

    type: Literal["mup"] = Field("mup", repr=False, description=KIND)
    use_mup: Literal[True] = Field(description="tells this kind from the others")


@section
class ExistingCheckpointInit:
    """Weights that exist already, without an optimizer's state or a step."""

    type: Literal["checkpoint"] = Field("checkpoint", repr=False, description=KIND)
    path: Annotated[Path, Field(strict=False)] = Field(
        description="a Hugging Face folder, a checkpoint's (Nanotron's too), or a run's (its newest)"
    )
