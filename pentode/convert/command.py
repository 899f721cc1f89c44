"""`pentode convert`: a checkpoint becomes a Hugging Face folder, or another library's folder becomes a checkpoint."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from pentode.checkpoint import storage
from pentode.checkpoint.manifest import STEP_NAME
from pentode.checkpoint.stored import Weights
from pentode.convert.to_hf import SHARD, shard_bytes, write_hf
from pentode.convert.to_pentode import write_checkpoint
from pentode.data.tokenizer import OURS, THEIRS, load_tokenizer
from pentode.errors import ConfigError
from pentode.run.build import DTYPES
from pentode.run.existing import HF, NANOTRON, PENTODE, Existing, Kind, kind_of, open_existing

KINDS: dict[str, Kind] = {kind: kind for kind in (PENTODE, HF, NANOTRON)}


def convert(
    source: Path,
    target: Path,
    *,
    kind: str | None = None,
    to: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = SHARD,
) -> Iterator[str]:
    """Write `target`, which appears when it is whole; gives the lines to print. A tensor is in memory at a time.

    source          a checkpoint's folder, a run's (its newest checkpoint), a Hugging Face folder, or Nanotron's
    kind            which of these it is: "pentode", "hf" or "nanotron"; None: as its files tell
    to              "hf" or "pentode"; None: "hf" from a checkpoint of ours, else "pentode"
    dtype           of the weights there; None: what they have
    max_shard_size  of a Hugging Face folder's files, as "5GB"
    """
    if kind is not None and kind not in KINDS:
        raise ConfigError([f"command line: --from {kind}: is unknown; use {', '.join(KINDS)}"])
    known = KINDS[kind] if kind is not None else kind_of(source)
    goal = to or (HF if known == PENTODE else PENTODE)
    _refuse(known, target, to=goal, dtype=dtype)
    wanted, limit = None if dtype is None else DTYPES[dtype], shard_bytes(max_shard_size)
    existing = open_existing(source, kind=known)
    notes = appears(target, lambda folder: _write(existing, folder, goal, dtype=wanted, limit=limit))
    whose = existing.weights.where
    if goal == HF:
        yield f"wrote {target}: the weights of {whose}, for Hugging Face"
    else:
        yield f"wrote {target}: the weights of {whose}; begin with them by model.init_method={{path: {target}}}"
    yield from (f"note: {note}" for note in notes)


def appears(target: Path, write: Callable[[Path], list[str]]) -> list[str]:
    """Have a folder written beside `target` and renamed to it when it is whole; what `write` has to say."""
    aside = target.absolute().with_name(f".tmp-{target.name}-{secrets.token_hex(4)}")
    try:
        storage.make_folder(aside)
        notes = write(aside)
        storage.sync_folder(aside)
        storage.rename(aside, target.absolute())
    except BaseException:
        with suppress(OSError):
            storage.remove(aside)
        raise
    return notes


def _refuse(kind: Kind, target: Path, *, to: str, dtype: str | None) -> None:
    found = []
    if to not in (HF, PENTODE):
        found.append(f"command line: --to {to}: is unknown; use {HF} or {PENTODE}")
    elif to == kind:
        found.append(f"command line: --to {to}: is what the source is; nothing is to be done")
    if dtype is not None and dtype not in DTYPES:
        found.append(f"command line: --dtype {dtype}: is unknown; use {', '.join(DTYPES)}")
    if target.exists() or target.is_symlink():
        found.append(f"{target}: is there already; name a folder that is not")
    elif to == PENTODE and STEP_NAME.fullmatch(target.name) and target.name != "0":
        found.append(f"{target}: a folder named {target.name} would be that step's checkpoint; choose another name")
    if found:
        raise ConfigError(found)


def _write(existing: Existing, folder: Path, to: str, *, dtype: torch.dtype | None, limit: int) -> list[str]:
    """Write weights and tokenizer into an empty folder; what its reader should know."""
    files, notes = _tokenizer(existing), []
    if not files:
        notes.append("there is no tokenizer, so none is written, and the model cannot write text by itself")
    elif OURS in files and to == HF:
        notes.append(f"its tokenizer is Pentode's own ({OURS}), which Hugging Face does not read")
    if existing.kind == NANOTRON and getattr(existing.shape, "rope_scaling", None) is not None:
        notes.append("rope_scaling is taken as it is written; Kenotron acts on it, Nanotron never did")
    dtype = dtype or _common(existing.weights)
    if to == HF:
        write_hf(folder, existing.shape, existing.weights, dtype=dtype, limit=limit, files=files)
    else:
        write_checkpoint(folder, existing.shape, existing.weights, dtype=dtype, files=files)
    return notes


def _tokenizer(existing: Existing) -> dict[str, bytes]:
    """The files of the tokenizer that is with the weights, by name; none where there is none."""
    checkpoint, folder = existing.checkpoint, existing.said_by.parent
    if checkpoint is not None:
        return {name: checkpoint.file(name) for name in (OURS, *THEIRS) if name in checkpoint.manifest.files}
    if (folder / OURS).is_file() or (folder / "tokenizer.json").is_file():
        return load_tokenizer(str(folder.absolute())).files()
    return {}


def _common(weights: Weights) -> torch.dtype:
    """The narrowest of a model's dtypes that holds all weights as they are."""
    widest = torch.bfloat16
    for tensor in weights.tensors.values():
        widest = torch.promote_types(widest, tensor.dtype)
    return widest
