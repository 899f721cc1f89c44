"""Writes tokens one after another with a key/value cache: a prompt is read once, then each step reads one token.

B sequences of equal length, S tokens in each, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pentode.generate.sampling import next_tokens
from pentode.nn.cache import Cache
from pentode.nn.causal_lm import CausalLM
from pentode.parallel.batch import Batch


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; `temperature` 0 is greedy. The same seed draws the same tokens."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 42


@torch.inference_mode()
def generate(
    model: CausalLM, tokens: Tensor, *, sampling: Sampling, max_positions: int, eos_id: int | None = None
) -> Tensor:
    """Continue `tokens` [B, S], at least one each, on the model's device -> [B, S + n], n <= max_new_tokens.

    Ends when every sequence has drawn `eos_id`, which also fills up those that ended before the others. A text that
    outgrows the model's `max_positions` is read again from its last half, so that generation never ends for that.
    """
    if tokens.shape[1] == 0:
        raise ValueError("generate: the prompt has no token; give at least one")
    was_training = model.training
    model.eval()
    generator = torch.Generator(tokens.device).manual_seed(sampling.seed)
    ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    context, cache = tokens[:, -max_positions:], None
    for _ in range(sampling.max_new_tokens):
        if cache is None or cache.length == max_positions:
            if cache is not None:
                context = tokens[:, -max(max_positions // 2, 1) :]
            cache = model.empty_cache(tokens.shape[0], max_positions)
        logits = model.logits(None, _after(cache, context), cache, last_only=True)  # [B, V]
        drawn = next_tokens(
            logits,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            generator=generator,
        )
        if eos_id is not None:
            drawn = drawn.masked_fill(ended, eos_id)
            ended |= drawn == eos_id
        context = drawn[:, None]
        tokens = torch.cat((tokens, context), dim=1)
        if eos_id is not None and bool(ended.all()):
            break
    model.train(was_training)
    return tokens


def _after(cache: Cache, tokens: Tensor) -> Batch:
    """The batch of `tokens` [B, S] that follow what the cache holds."""
    rows, length = tokens.shape
    positions = torch.arange(cache.length, cache.length + length, device=tokens.device).expand(rows, length)
    samples = torch.arange(rows, device=tokens.device)
    return Batch(tokens.flatten(), tokens.flatten(), positions.flatten(), samples)
