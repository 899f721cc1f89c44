"""Text to token ids and back: by character, by byte, or as a Hugging Face tokenizer.json says.

A tokenizer is saved as a few small files, so that a checkpoint carries the one it was trained with; `load_tokenizer`
reads those as well as any Hugging Face folder.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from pentode.data.files import read_bytes, reason
from pentode.data.windows import fingerprint_of, token_dtype
from pentode.errors import DataError

OURS = "pentode_tokenizer.json"  # holds our own kinds, which no other library reads
THEIRS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]")  # where no file says which one ends a text
CODE_POINTS = 0x110000


class Tokenizer(Protocol):
    """Text to ids and back.

    vocab_size   ids are below it
    eos_id       the token that ends a document, or None
    fingerprint  a hash of the content
    """

    vocab_size: int
    eos_id: int | None
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, [n] of token_dtype(vocab_size)."""
        ...

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, ended by the end token where there is one."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens left out."""
        ...

    def files(self) -> dict[str, bytes]:
        """Everything `load_tokenizer` needs, by file name."""
        ...


class CharTokenizer:
    """Each character is a token; ids follow the order of the code points."""

    eos_id = None

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.vocab_size = len(characters)
        self.fingerprint = fingerprint_of("character", characters.encode("utf-8", "surrogatepass"))
        self._ids = np.full(CODE_POINTS, -1, dtype=np.int32)
        self._ids[_code_points(characters)] = np.arange(len(characters))

    @staticmethod
    def of(text: str) -> "CharTokenizer":
        """The tokenizer of the characters in `text`."""
        seen = np.zeros(CODE_POINTS, dtype=bool)
        seen[_code_points(text)] = True
        return CharTokenizer("".join(map(chr, np.flatnonzero(seen))))

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, [n]; DataError for a character that the vocabulary lacks."""
        ids = self._ids[_code_points(text)]
        if ids.size and ids.min() < 0:
            at = int(ids.argmin())
            raise DataError(
                f"text: character {text[at]!r} (U+{ord(text[at]):04X}) at place {at} is not among the "
                f"{self.vocab_size} characters of the training text; leave it out"
            )
        return ids.astype(token_dtype(self.vocab_size))

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text; no token marks its end."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; one beyond the characters, from a model with room for more, is a replacement character."""
        return "".join(self.characters[i] if i < self.vocab_size else "\ufffd" for i in ids)

    def files(self) -> dict[str, bytes]:
        """Everything `load_tokenizer` needs, by file name."""
        return {OURS: json.dumps({"kind": "character", "characters": self.characters}).encode()}


class ByteTokenizer:
    """Each byte of the text's UTF-8 is a token."""

    eos_id = None
    vocab_size = 256
    fingerprint = fingerprint_of("byte")

    def encode(self, text: str) -> np.ndarray:
        """The bytes of `text`, uint8 [n]."""
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text; no token marks its end."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become replacement characters."""
        return bytes(ids).decode("utf-8", "replace")

    def files(self) -> dict[str, bytes]:
        """Everything `load_tokenizer` needs, by file name."""
        return {OURS: json.dumps({"kind": "byte"}).encode()}


class HFTokenizer:
    """A Hugging Face fast tokenizer: the files of its folder, of which tokenizer.json is the tokenizer itself."""

    def __init__(self, files: dict[str, bytes], *, name: str) -> None:
        try:
            self._fast = FastTokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # tokenizers raises plain Exception
            raise DataError(
                f"{name}: tokenizer.json cannot be read: {reason(error)}; save the tokenizer anew"
            ) from error
        self._fast.no_truncation()  # a document is never shortened or filled up, whatever the file asks for
        self._fast.no_padding()
        self.vocab_size = max(self._fast.get_vocab().values(), default=-1) + 1
        self.eos_id = _end_token(files, self._fast, name=name)
        self.fingerprint = fingerprint_of("hf", files["tokenizer.json"], str(self.eos_id))
        self._files = {file: content for file, content in files.items() if file != "config.json"}
        if self.eos_id is not None:
            marks = _json_object(files, "special_tokens_map.json", name=name)
            marks["eos_token"] = self._fast.id_to_token(self.eos_id)
            self._files["special_tokens_map.json"] = json.dumps(marks).encode()

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, with the special tokens that the tokenizer itself adds, [n]."""
        return np.array(self._fast.encode(text).ids, dtype=token_dtype(self.vocab_size))

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, ended by the end token where there is one; on all cores."""
        end = [] if self.eos_id is None else [self.eos_id]
        kind = token_dtype(self.vocab_size)
        coded = (encoding.ids for encoding in self._fast.encode_batch_fast(list(texts)))
        return [np.array(ids if ids[-1:] == end else ids + end, dtype=kind) for ids in coded]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self._fast.decode(list(ids))

    def files(self) -> dict[str, bytes]:
        """Everything `load_tokenizer` needs, by file name; transformers reads the folder too."""
        return dict(self._files)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer in a folder, in a tokenizer.json, or on the Hugging Face hub under `name`."""
    path = Path(name).expanduser()
    if path.is_file():
        return HFTokenizer(
            _read_files(lambda file: path if file == "tokenizer.json" else path.parent / file), name=name
        )
    if (path / OURS).is_file():
        return _load_ours(path / OURS)
    if path.is_dir():
        return HFTokenizer(_read_files(path.joinpath), name=name)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise DataError(f"{name}: no such file or folder; a tokenizer is a folder with a tokenizer.json, or that file")
    return HFTokenizer(_read_files(lambda file: _from_hub(name, file)), name=name)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files into `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _load_ours(path: Path) -> Tokenizer:
    match _json_object({OURS: read_bytes(path)}, OURS, name=str(path.parent)):
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "character", "characters": str(characters)}:
            return CharTokenizer(characters)
    raise DataError(f"{path}: is not a tokenizer that this version knows; it was saved by another one")


def _read_files(locate: Callable[[str], Path | None]) -> dict[str, bytes]:
    """The files that there are; tokenizer.json must be."""
    first, *others = THEIRS
    found = {file: path for file in others if (path := locate(file)) is not None and path.is_file()}
    return {file: read_bytes(path) for file, path in [(first, locate(first)), *found.items()]}


def _from_hub(name: str, file: str) -> Path | None:
    """A file of a repository on the hub, through its local cache; None where it has no such file but needs none."""
    import huggingface_hub  # takes most of a second, and only a name on the hub needs it
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(name, file))
    except (EntryNotFoundError, OSError, ValueError) as error:
        if file == "tokenizer.json":
            raise DataError(
                f"{name}: its tokenizer.json cannot be fetched from the Hugging Face hub: {reason(error)}; "
                "name a local folder that holds one"
            ) from error
        return None


def installed_version(package: str) -> str | None:
    """The version of an installed package, None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _json_object(files: dict[str, bytes], file: str, *, name: str) -> dict:
    try:
        content = json.loads(files.get(file, b"{}"))
    except ValueError as error:
        raise DataError(f"{name}: {file} is not JSON: {reason(error)}; save the tokenizer anew") from error
    return content if isinstance(content, dict) else {}


def _end_token(files: dict[str, bytes], fast: FastTokenizer, *, name: str) -> int | None:
    """The id of the token that ends a document: as the folder's files say, else a token of a usual name, else None."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _json_object(files, file, name=name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and (found := fast.token_to_id(token)) is not None:
            return found
    ids = _json_object(files, "config.json", name=name).get("eos_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    if isinstance(first, int) and fast.id_to_token(first) is not None:
        return first
    return next((found for token in END_TOKENS if (found := fast.token_to_id(token)) is not None), None)
