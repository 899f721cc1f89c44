"""`pentode convert`: a checkpoint becomes a Hugging Face folder, or the other way round."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from pentode.checkpoint import storage
from pentode.checkpoint.manifest import STEP_NAME
from pentode.checkpoint.stored import Weights
from pentode.config.load import load_config
from pentode.convert.to_hf import SHARD, shard_bytes, write_hf
from pentode.convert.to_pentode import write_checkpoint
from pentode.data.tokenizer import OURS, THEIRS, load_tokenizer
from pentode.errors import ConfigError
from pentode.run.build import DTYPES
from pentode.run.existing import HF, PENTODE, Existing, Kind, kind_of, open_existing


def convert(
    source: Path, target: Path, *, to: str | None = None, dtype: str | None = None, max_shard_size: str = SHARD
) -> Iterator[str]:
    """Write `target`, which appears when it is whole; gives the lines to print. A tensor is in memory at a time.

    source          a checkpoint's folder, a run's (its newest checkpoint), or a Hugging Face folder
    to              "hf" or "pentode"; None: what the source is not
    dtype           of the weights there; None: what they have
    max_shard_size  of a Hugging Face folder's files, as "5GB"
    """
    kind = kind_of(source)
    _refuse(kind, target, to=to, dtype=dtype)
    wanted, limit = None if dtype is None else DTYPES[dtype], shard_bytes(max_shard_size)
    existing = open_existing(source)
    if kind == PENTODE:
        notes = appears(target, lambda folder: export(existing, folder, dtype=wanted, limit=limit))
        yield f"wrote {target}: the weights of {existing.weights.where}, for Hugging Face"
    else:
        notes = appears(target, lambda folder: _take_over(existing, source, folder, wanted))
        yield f"wrote {target}: the weights of {source}; begin with checkpoints.resume_checkpoint_path={target}"
        yield "and checkpoints.load_optimizer=false"
    yield from (f"note: {note}" for note in notes)


def export(existing: Existing, folder: Path, *, dtype: torch.dtype | None, limit: int) -> list[str]:
    """Write a checkpoint's weights and tokenizer into an empty folder, for Hugging Face; gives notes to its reader."""
    checkpoint = existing.checkpoint
    assert checkpoint is not None, f"{existing.said_by} is no checkpoint's"
    files = [name for name in (OURS, *THEIRS) if name in checkpoint.manifest.files]
    kept = DTYPES[load_config(existing.said_by).model.dtype]
    write_hf(
        folder,
        existing.shape,
        existing.weights,
        dtype=dtype or kept,
        limit=limit,
        files={name: checkpoint.file(name) for name in files},
    )
    if OURS in files:
        return [f"its tokenizer is Pentode's own ({OURS}), which Hugging Face does not read"]
    return [] if files else ["it has no tokenizer, so the folder has none"]


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


def _refuse(kind: Kind, target: Path, *, to: str | None, dtype: str | None) -> None:
    found = []
    if to not in (None, HF, PENTODE):
        found.append(f"command line: --to {to}: is unknown; use {HF} or {PENTODE}")
    elif to == kind:
        found.append(f"command line: --to {to}: is what the source is; nothing is to be done")
    if dtype is not None and dtype not in DTYPES:
        found.append(f"command line: --dtype {dtype}: is unknown; use {', '.join(DTYPES)}")
    if target.exists() or target.is_symlink():
        found.append(f"{target}: is there already; name a folder that is not")
    elif kind == HF and STEP_NAME.fullmatch(target.name) and target.name != "0":
        found.append(f"{target}: a folder named {target.name} would be that step's checkpoint; choose another name")
    if found:
        raise ConfigError(found)


def _take_over(existing: Existing, source: Path, folder: Path, dtype: torch.dtype | None) -> list[str]:
    """Write another library's weights and tokenizer into an empty folder, as a checkpoint."""
    files, notes = {}, []
    if (source / OURS).is_file() or (source / "tokenizer.json").is_file():
        files = load_tokenizer(str(source.absolute())).files()
    else:
        notes.append("there is no tokenizer.json, so the checkpoint cannot write text")
    kept = dtype or _common(existing.weights)
    write_checkpoint(folder, existing.shape, existing.weights, dtype=kept, files=files)
    return notes


def _common(weights: Weights) -> torch.dtype:
    """The narrowest of a model's dtypes that holds all weights as they are."""
    widest = torch.bfloat16
    for tensor in weights.tensors.values():
        widest = torch.promote_types(widest, tensor.dtype)
    return widest
