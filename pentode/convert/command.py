"""`pentode convert`: a checkpoint becomes a Hugging Face folder, or the other way round."""

import platform
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pentode.checkpoint import storage
from pentode.checkpoint.folder import Checkpoint, find_checkpoint, steps
from pentode.checkpoint.hf import from_hf, to_hf
from pentode.checkpoint.layout import Saved
from pentode.checkpoint.load import read_tensors
from pentode.checkpoint.manifest import MANIFEST, STEP_NAME
from pentode.checkpoint.save import save
from pentode.config.check import problems
from pentode.config.dump import to_yaml
from pentode.config.kinds.shape import Shape
from pentode.config.load import config_from_dict, load_config
from pentode.config.schema import Config
from pentode.convert.hf_folder import is_hf_folder, read_shape, read_weights, write_model
from pentode.data.tokenizer import OURS, THEIRS, load_tokenizer
from pentode.dist.mesh import Mesh
from pentode.errors import CheckpointError, ConfigError
from pentode.models.registry import model_for
from pentode.nn.causal_lm import Part
from pentode.parallel.spec import ParamSpec, specs_of
from pentode.run.build import DTYPES
from pentode.version import VERSION

HF, PENTODE = "hf", "pentode"
NO_STEPS = {"step": 0, "consumed_samples": 0, "consumed_tokens": 0}


def convert(source: Path, target: Path, *, to: str | None = None, dtype: str | None = None) -> Iterator[str]:
    """Write `target`, which appears when it is whole; gives the lines to print.

    source  a checkpoint's folder, a run's (its newest checkpoint), or a Hugging Face folder
    to      "hf" or "pentode"; None: what the source is not
    dtype   of the weights there; None: what they have
    """
    kind = _kind(source)
    _refuse(kind, target, to=to, dtype=dtype)
    wanted = None if dtype is None else DTYPES[dtype]
    if kind == PENTODE:
        checkpoint = find_checkpoint(source)
        notes = _appears(target, lambda folder: _write_hf(checkpoint, folder, wanted))
        yield f"wrote {target}: the weights of {checkpoint}, for Hugging Face"
    else:
        notes = _appears(target, lambda folder: _write_pentode(source, folder, wanted))
        yield f"wrote {target}: the weights of {source}; begin with checkpoints.resume_checkpoint_path={target}"
        yield "and checkpoints.load_optimizer=false"
    yield from (f"note: {note}" for note in notes)


def _kind(source: Path) -> str:
    if (source / MANIFEST).exists() or steps(source):
        return PENTODE
    if is_hf_folder(source):
        return HF
    raise CheckpointError(
        f"{source}: neither a checkpoint, nor a run with one, nor a Hugging Face folder with config.json and "
        "model.safetensors; give one of them"
    )


def _refuse(kind: str, target: Path, *, to: str | None, dtype: str | None) -> None:
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


def _appears(target: Path, write: Callable[[Path], list[str]]) -> list[str]:
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


def _write_hf(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None) -> list[str]:
    checkpoint.file("config.yaml")  # proves its checksum
    config = load_config(checkpoint.folder / "config.yaml")
    shape, kept = config.model.model_config, DTYPES[config.model.dtype]
    shape.to_hf()  # refuses what Hugging Face has no form of
    specs = _specs(shape)
    ours = {name: torch.empty(spec.global_shape, dtype=kept) for name, spec in specs.items()}
    read_tensors(checkpoint, "weights", {name: Saved.whole(tensor) for name, tensor in ours.items()})
    weights = to_hf(model_for(shape).HF_NAMES, _cast(ours, dtype), specs=specs)
    write_model(folder, shape, weights, dtype=dtype or kept)
    files = [name for name in (OURS, *THEIRS) if name in checkpoint.manifest.files]
    for name in files:
        storage.write(folder / name, [checkpoint.file(name)])
    if OURS in files:
        return [f"its tokenizer is Pentode's own ({OURS}), which Hugging Face does not read"]
    return [] if files else ["it has no tokenizer, so the folder has none"]


def _write_pentode(source: Path, folder: Path, dtype: torch.dtype | None) -> list[str]:
    shape = read_shape(source)
    found = problems(_config(shape, torch.float32), world_size=1)
    if found:
        raise ConfigError([f"{source}: {problem}" for problem in found])
    specs, theirs = _specs(shape), read_weights(source)
    kept = dtype or _common(theirs)
    ours = _cast(from_hf(model_for(shape).HF_NAMES, theirs, tied=shape.tied), kept)
    _compare(source, ours, specs)
    files, notes = {}, []
    if (source / OURS).is_file() or (source / "tokenizer.json").is_file():
        files = load_tokenizer(str(source.absolute())).files()
    else:
        notes.append("there is no tokenizer.json, so the checkpoint cannot write text")
    files["config.yaml"] = to_yaml(_config(shape, kept)).encode()
    state: dict[str, Any] = {"train": NO_STEPS, "updates": 0}
    state["versions"] = {"pentode": VERSION, "torch": torch.__version__, "python": platform.python_version()}
    groups = {"weights": {name: Saved.whole(tensor) for name, tensor in ours.items()}}
    saved = save(folder / "run", step=0, groups=groups, state=state, files=files)
    for path in sorted(saved.iterdir()):
        storage.rename(path, folder / path.name)
    storage.remove(folder / "run")
    return notes


def _specs(shape: Shape) -> dict[str, ParamSpec]:
    """What the parameters of a model of this shape are, in one process; no memory is taken for them."""
    whole = Part.whole(shape.num_layers)
    model = model_for(shape).build(
        shape,
        Mesh.single(),
        whole,
        device=torch.device("meta"),
        dtype=torch.float32,
        vocab_size_padded=shape.vocab_size,
    )
    return specs_of(model)


def _compare(source: Path, ours: Mapping[str, Tensor], specs: Mapping[str, ParamSpec]) -> None:
    """Refuse weights that are not those of the shape."""
    for name in sorted(specs.keys() ^ ours.keys()):
        where = "is not there" if name in specs else "is there"
        raise CheckpointError(f"{source}: {name} {where}, against what config.json says")
    for name, spec in specs.items():
        if tuple(ours[name].shape) != spec.global_shape:
            raise CheckpointError(
                f"{source}: {name} is {list(ours[name].shape)}, by config.json {list(spec.global_shape)}"
            )


def _common(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The narrowest of a model's dtypes that holds all weights as they are."""
    widest = torch.bfloat16
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            continue  # masks of former versions, which are passed over
        if tensor.element_size() < torch.bfloat16.itemsize:
            raise CheckpointError(f"Hugging Face weights: {name} is {tensor.dtype}; quantized weights are not read")
        widest = torch.promote_types(widest, tensor.dtype)
    return widest


def _cast(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in weights.items()}


def _config(shape: Shape, dtype: torch.dtype) -> Config:
    """A config that has the model; what it says of training are beginnings for its reader to change."""
    return config_from_dict(
        {
            "general": {"project": "converted", "run": "converted", "step": 0, "consumed_train_samples": 0},
            "parallelism": {"dp": 1, "pp": 1, "tp": 1},
            "model": {
                "dtype": str(dtype).removeprefix("torch."),
                "init_method": {"std": 0.02},
                "model_config": asdict(shape),  # pyright: ignore[reportArgumentType]
            },
            "checkpoints": {"checkpoints_path": "checkpoints", "checkpoint_interval": 1000},
            "tokens": {
                "sequence_length": shape.max_positions,
                "train_steps": 1,
                "micro_batch_size": 1,
                "batch_accumulation_per_replica": 1,
            },
            "optimizer": {
                "optimizer_factory": {
                    "name": "adamW",
                    "adam_eps": 1e-8,
                    "adam_beta1": 0.9,
                    "adam_beta2": 0.95,
                    "torch_adam_is_fused": True,
                },
                "zero_stage": 0,
                "weight_decay": 0.1,
                "clip_grad": 1.0,
                "accumulate_grad_in_fp32": True,
                "learning_rate_scheduler": {"learning_rate": 1e-5},
            },
            "data_stages": [{"name": "none", "start_training_step": 1, "data": {"dataset": None}}],
        }
    )
