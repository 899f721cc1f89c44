"""Which token comes next: greedy, temperature, top-k, top-p."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pentode.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How a text goes on; the same seed draws the same tokens.

    temperature  0 takes the likeliest token
    top_k        only the k likeliest tokens can come
    top_p        only the fewest likeliest tokens whose probabilities sum to at least p (nucleus sampling,
                 arXiv:1904.09751, section 3.1)
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        problems = []
        if not self.max_new_tokens >= 0:
            problems.append(f"max_new_tokens: {self.max_new_tokens}; give 0 or more")
        if not self.temperature >= 0:
            problems.append(f"temperature: {self.temperature}; give 0 or more")
        if self.top_k is not None and not self.top_k >= 1:
            problems.append(f"top_k: {self.top_k}; give 1 or more")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            problems.append(f"top_p: {self.top_p}; give a number from 0 to 1")
        if problems:
            raise ConfigError(problems)


def next_tokens(logits: Tensor, *, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token for each row of logits [B, V] -> [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(filtered(logits, sampling).softmax(-1), 1, generator=generator)[:, 0]


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """The logits that tokens are drawn from, in float32 or wider: temperature, then top-k, then top-p.  # [B, V]"""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    if sampling.top_k is not None:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    return logits


def _nucleus(logits: Tensor, p: float) -> Tensor:
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    likelier = probabilities.cumsum(-1) - probabilities  # what the tokens before each sum to
    cut = likelier >= p
    cut[:, 0] = False
    return torch.empty_like(logits).scatter(-1, order, ordered.masked_fill(cut, -torch.inf))
