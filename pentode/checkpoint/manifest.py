"""What a checkpoint's folder is made of: its names, its manifest, its JSON. No disk access here, and no torch.

docs/formats.md describes the same, for a reader in another language.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

FORMAT = "pentode-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"

STEP_NAME = re.compile(r"0|[1-9][0-9]{0,11}", re.ASCII)
HIDDEN_NAME = re.compile(r"\.(tmp|old|trash|bad)-([a-z0-9]+)-[0-9a-f]{8}", re.ASCII)  # why, what: see save.py
FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,120}", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


class NewerFormatError(ValueError):
    """A manifest of a format version that this Pentode does not know."""


@dataclass(frozen=True)
class FileFacts:
    """What the manifest knows of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint by name, each with its size and checksum; what is not listed does not belong to it."""

    step: int
    files: Mapping[str, FileFacts]

    def digest(self) -> str:
        """SHA-256 over all that the manifest says, so that a line lost from it is noticed."""
        lines = [f"{FORMAT} {FORMAT_VERSION} {self.step}"]
        lines += [f"{name} {facts.size} {facts.sha256}" for name, facts in sorted(self.files.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def dump(self) -> bytes:
        """The bytes of manifest.json."""
        files = {name: {"size": facts.size, "sha256": facts.sha256} for name, facts in self.files.items()}
        return json_bytes(
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "step": self.step,
                "files": files,
                "digest": self.digest(),
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> "Manifest":
        """Read manifest.json; ValueError says what is wrong with it."""
        found = parse_json(data)
        if found.get("format") != FORMAT:
            raise ValueError(f"its format is {found.get('format')!r}, not {FORMAT}")
        version = found.get("format_version")
        if type(version) is int and version > FORMAT_VERSION:
            raise NewerFormatError(f"its format version is {version}, this Pentode reads {FORMAT_VERSION}")
        step, files = found.get("step"), found.get("files")
        if version != FORMAT_VERSION or not is_count(step) or not isinstance(files, dict):
            raise ValueError("its format_version, step or files are not what they must be")
        manifest = cls(step, {name: _facts(name, facts) for name, facts in files.items()})
        if found.get("digest") != manifest.digest():
            raise ValueError("it was changed after it was written: its digest is another")
        return manifest


def json_bytes(what: Mapping[str, object]) -> bytes:
    """JSON that is the same for the same content: sorted keys, no NaN."""
    return (json.dumps(what, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def parse_json(data: bytes) -> dict[str, Any]:
    """Strict JSON: an object, without NaN or repeated keys; else ValueError."""
    try:
        found = json.loads(data.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def header_table(text: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a tensor file's JSON header says of each box, by name, and the global shapes of tensors that are cut."""
    table = parse_json(text)
    metadata = table.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("global_shapes"), str):
        raise ValueError("its header lacks the global shapes")
    return table, parse_json(metadata["global_shapes"].encode())


def _facts(name: str, found: object) -> FileFacts:
    if not FILE_NAME.fullmatch(name):
        raise ValueError(f"it lists a file named {name[:80]!r}")
    if not isinstance(found, dict) or not is_count(found.get("size")) or not SHA256.fullmatch(str(found.get("sha256"))):
        raise ValueError(f"it does not tell size and sha256 of {name}")
    return FileFacts(found["size"], found["sha256"])


def is_count(found: object) -> TypeGuard[int]:
    """Whether something read is a whole number from 0 on; true and false are none."""
    return type(found) is int and found >= 0


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has a key twice")
    return found
