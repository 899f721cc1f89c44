"""The nonlinearities of feed-forward layers, by the names that Hugging Face gives them."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),  # the formula of GPT-2, spelled out there
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
