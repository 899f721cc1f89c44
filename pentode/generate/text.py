"""Text in, text out: a model with its tokenizer."""

import torch

from pentode.data.tokenizer import Tokenizer
from pentode.errors import DataError
from pentode.generate.engine import Sampling, generate
from pentode.nn.causal_lm import CausalLM


def continue_text(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    sampling: Sampling,
    max_positions: int,
    device: torch.device,
) -> str:
    """The prompt and what the model writes after it. An empty prompt begins with the end-of-text token, or token 0."""
    ids = tokenizer.encode(prompt).tolist() if prompt else []
    start = ids or [tokenizer.eos_id or 0]
    if max(start) >= model.vocab.size:
        raise DataError(f"prompt: token id {max(start)} is beyond the model's vocabulary of {model.vocab.size}")
    tokens = torch.tensor([start], device=device)
    found = generate(model, tokens, sampling=sampling, max_positions=max_positions, eos_id=tokenizer.eos_id)
    written = found[0, len(start) :].tolist()
    if tokenizer.eos_id in written:
        written = written[: written.index(tokenizer.eos_id)]
    return tokenizer.decode(ids + written)
