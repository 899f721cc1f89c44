"""One text as training data: every window of it is a sample, by character or by byte."""

from pathlib import Path
from typing import Literal

import numpy as np

from pentode.data.files import read_bytes
from pentode.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from pentode.data.windows import Windows, fingerprint_of, split
from pentode.errors import DataError

STANDARD_TEXT = "pydoc_data.topics"  # the standard library's own text: 0.7 MB that need no download


def open_text_file(
    text_file: str, *, tokenization: Literal["character", "byte"], sequence_length: int, validation_fraction: float
) -> tuple[Windows, Windows | None, Tokenizer]:
    """Training samples (a window at every offset), validation samples (windows that share one token) and tokenizer."""
    content = _standard_text() if text_file == STANDARD_TEXT else read_bytes(Path(text_file).expanduser())
    if not content:
        raise DataError(f"{text_file}: is empty; name a file with text")
    if tokenization == "byte":
        tokenizer: Tokenizer = ByteTokenizer()
        tokens = np.frombuffer(content, dtype=np.uint8)
    else:
        text = _decoded(content, name=text_file)
        tokenizer = CharTokenizer.of(text)
        tokens = tokenizer.encode(text)

    training, held_out = split(tokens, validation_fraction=validation_fraction)
    facts = {
        "sequence_length": sequence_length,
        "vocab_size": tokenizer.vocab_size,
        "largest_id": int(tokens.max()),
        "fingerprint": fingerprint_of(tokenizer.fingerprint, len(training), content),
    }
    train = Windows(training, name=text_file, stride=1, **facts)
    if not len(held_out):
        return train, None, tokenizer
    name = f"{text_file}, its last {len(held_out) / len(tokens):.3g}"
    return train, Windows(held_out, name=name, stride=sequence_length, **facts), tokenizer


def _standard_text() -> bytes:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            f"{STANDARD_TEXT}: this Python comes without it; give data.dataset.text_file the path of a text of yours"
        ) from error
    return "".join(topics[key] for key in sorted(topics)).encode()


def _decoded(content: bytes, *, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: is not UTF-8 text: byte 0x{content[error.start]:02x} at offset {error.start}; "
            "convert it, or set tokenization: byte"
        ) from error
