"""Text in, text out: a model with its tokenizer."""

import torch

from pentode.config.schema import Config
from pentode.data.tokenizer import Tokenizer
from pentode.errors import DataError
from pentode.generate.engine import Speaker, generate
from pentode.generate.sampling import Sampling
from pentode.nn.causal_lm import CausalLM


def continue_text(
    model: CausalLM | Speaker,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    config: Config,
    sampling: Sampling,
    device: torch.device,
) -> str:
    """The prompt and what the model, trained as `config` says, writes after it. An empty prompt begins a new text.

    Tokens that only the model has, whose vocabulary may be the larger one, are left out.
    DataError for a prompt that the tokenizer or the model has no token for.
    """
    speaker = Speaker.of(model)
    ids, start = first_ids(tokenizer, prompt, vocab_size=speaker.vocab_size)
    found = generate(
        speaker,
        torch.tensor([start], device=device),
        sampling=sampling,
        max_positions=context_length(config),
        eos_id=tokenizer.eos_id,
    )
    written = found[0, len(start) :].tolist()
    if tokenizer.eos_id in written:
        written = written[: written.index(tokenizer.eos_id)]
    return tokenizer.decode(ids + [i for i in written if i < tokenizer.vocab_size])


def context_length(config: Config) -> int:
    """How many tokens the model has learned to read at once: positions beyond its longest sequences are untrained."""
    lengths = [stage.sequence_length or config.tokens.sequence_length for stage in config.data_stages]
    return min(config.model.model_config.max_positions, max(lengths))


def first_ids(tokenizer: Tokenizer, prompt: str, *, vocab_size: int) -> tuple[list[int], list[int]]:
    """The prompt's tokens, and those that the model reads first: the same ones, or what stands before a new text."""
    ids = _prompt_ids(tokenizer, prompt)
    start = ids or _beginning(tokenizer)
    if max(start) >= vocab_size:
        raise DataError(
            f"prompt: has token id {max(start)}, beyond the model's vocabulary of {vocab_size}; leave it out"
        )
    return ids, start


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's tokens, without the end-of-text token that some tokenizers add: the text is to go on."""
    ids = tokenizer.encode(prompt).tolist()
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_id else ids


def _beginning(tokenizer: Tokenizer) -> list[int]:
    """What stands before a text: the end of another, or of a line, where the vocabulary has either."""
    if tokenizer.eos_id is not None:
        return [tokenizer.eos_id]
    try:
        return tokenizer.encode("\n").tolist() or [0]
    except DataError:
        return [0]
