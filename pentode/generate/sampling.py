"""Which token comes next: greedy, temperature, top-k, top-p."""

import torch
from torch import Tensor


def next_tokens(
    logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Draw one token for each row of logits [B, V] -> [B].

    temperature  0 takes the likeliest token
    top_k        only the k likeliest tokens can come
    top_p        only the fewest likeliest tokens whose probabilities sum to at least p (nucleus sampling,
                 arXiv:1904.09751, section 3.1); cut after temperature, as `transformers` does
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        logits = _nucleus(logits, top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # probability of all likelier tokens; 0 for the likeliest
    ordered = ordered.masked_fill((before >= top_p) & (before > 0), -torch.inf)
    return torch.empty_like(logits).scatter(-1, order, ordered)
