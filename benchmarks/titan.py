"""torchtitan 0.2.2 on one of our shapes with random tokens: the peer that benchmarks/gpu.py runs beside us.

usage: torchrun ... benchmarks/titan.py SHAPE [options of torchtitan]

Only its table of models and its data are replaced, so that the figure is the step's alone. It needs, beside torch 2.11:
torchtitan==0.2.2 torchdata datasets tomli tyro docstring-parser typeguard shtab dill multiprocess.
"""

# ruff: noqa: E402 - torchtitan reads sys.argv when it is imported
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHAPE, OPTIONS = sys.argv[1], sys.argv[2:]
sys.argv = ["train.py", "--model.name", "llama3", "--model.flavor", SHAPE, *OPTIONS]  # torchtitan reads it at import
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torchtitan.models.llama3 as llama3
import torchtitan.train as titan
from torch import Tensor
from torchtitan.models.llama3 import TransformerModelArgs

from benchmarks.shapes import LLAMA, VOCABULARY

MULTIPLE = 256  # torchtitan rounds the feed-forward width up to this


class RandomTokens:
    """What torchtitan asks of a data loader, with tokens made on the spot."""

    def __init__(self, batch: int, sequence: int) -> None:
        self.batch, self.sequence = batch, sequence

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            tokens = torch.randint(0, VOCABULARY, (self.batch, self.sequence + 1), generator=generator)
            yield {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it begins anew."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


def model_args() -> TransformerModelArgs:
    """The shape, in torchtitan's terms."""
    width, layers, heads, kv_heads, features = LLAMA[SHAPE]
    return TransformerModelArgs(
        dim=width,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        ffn_dim_multiplier=features / (2 * 4 * width / 3),
        multiple_of=MULTIPLE,
        vocab_size=VOCABULARY,
        rope_theta=500000,
    )


def train_spec(name: str) -> Any:
    """llama3's, with our shape and tokens."""
    spec = llama3.get_train_spec()
    spec.model_args = {SHAPE: model_args()}
    spec.build_tokenizer_fn = spec.build_validator_fn = None

    def tokens(*, job_config: Any, **_: object) -> RandomTokens:
        return RandomTokens(job_config.training.local_batch_size, job_config.training.seq_len)

    spec.build_dataloader_fn = tokens
    return spec


if __name__ == "__main__":
    titan.train_spec_module.get_train_spec = train_spec
    titan.main(titan.Trainer)
