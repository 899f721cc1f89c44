"""Which model file builds which shape: the one line to add for a new model."""

from types import ModuleType

from pentode.config.kinds.gpt2 import GPT2Config
from pentode.config.kinds.llama import LlamaConfig
from pentode.config.kinds.shape import Shape
from pentode.models import gpt2, llama

MODELS: dict[type[Shape], ModuleType] = {LlamaConfig: llama, GPT2Config: gpt2}


def model_for(shape: Shape) -> ModuleType:
    """The module whose `build` makes the shape's model and whose `HF_NAMES` name its weights.

    One whose models Nanotron has, too, names their weights there in `NANOTRON_NAMES`.
    """
    return MODELS[type(shape)]
