"""Writes tokens one after another with a key/value cache: a prompt is read once, then each step reads one token.

B sequences of equal length, S tokens in each, V vocabulary.
"""

import torch
from torch import Tensor

from pentode.generate.sampling import Sampling, next_tokens
from pentode.nn.cache import Cache
from pentode.nn.causal_lm import CausalLM
from pentode.parallel.batch import Batch


@torch.no_grad()
def generate(
    model: CausalLM, tokens: Tensor, *, sampling: Sampling, max_positions: int, eos_id: int | None = None
) -> Tensor:
    """Continue `tokens` [B, S], at least one each, on the model's device -> [B, S + n], n <= max_new_tokens.

    Ends when every sequence has drawn `eos_id`, which also fills up those that ended before the others. Of a text
    longer than `max_positions` the end is read; one that outgrows them is read again from its last half, so that
    generation never ends for that.
    """
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(
            f"generate: tokens are {list(tokens.shape)}; give [sequences, tokens], at least one token each"
        )
    least, most = (int(end) for end in tokens.aminmax())
    if least < 0 or most >= model.vocab.size:
        odd = least if least < 0 else most
        raise ValueError(f"generate: token id {odd} is beyond the model's vocabulary of {model.vocab.size}")
    was_training = model.training
    model.eval()
    try:
        return _continue(model, tokens, sampling, max_positions, eos_id)
    finally:
        model.train(was_training)


def _continue(model: CausalLM, tokens: Tensor, sampling: Sampling, max_positions: int, eos_id: int | None) -> Tensor:
    rows = tokens.shape[0]
    generator = torch.Generator(tokens.device).manual_seed(sampling.seed)
    ended = torch.zeros(rows, dtype=torch.bool, device=tokens.device)
    cache, unread = None, tokens[:, -max_positions:]
    for left in range(sampling.max_new_tokens, 0, -1):
        if cache is not None and cache.length == max_positions:
            cache, unread = None, tokens[:, -max(max_positions // 2, 1) :]
        if cache is None:
            cache = model.empty_cache(rows, min(unread.shape[1] + left - 1, max_positions))  # the last is never read
        logits = model.logits(None, _after(cache, unread), cache, last_only=True)  # [B, V]
        drawn = next_tokens(logits, sampling=sampling, generator=generator)
        if eos_id is not None:
            drawn = drawn.masked_fill(ended, eos_id)
            ended |= drawn == eos_id
        unread = drawn[:, None]
        tokens = torch.cat((tokens, unread), dim=1)
        if eos_id is not None and bool(ended.all()):
            break
    return tokens


def _after(cache: Cache, tokens: Tensor) -> Batch:
    """The batch of `tokens` [B, S] that follow what the cache holds."""
    rows, length = tokens.shape
    positions = torch.arange(cache.length, cache.length + length, device=tokens.device).expand(rows, length)
    samples = torch.arange(rows, device=tokens.device)
    return Batch(tokens.flatten(), tokens.flatten(), positions.flatten(), samples)
