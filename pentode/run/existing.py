"""Weights that exist already: recognised by their folder, described, and any part of them read."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pentode.checkpoint.folder import Checkpoint, find_checkpoint, steps
from pentode.checkpoint.hf import CONFIG, hf_shape, hf_weights, is_hf_folder
from pentode.checkpoint.layout import Saved
from pentode.checkpoint.load import weights_of
from pentode.checkpoint.manifest import MANIFEST
from pentode.checkpoint.nanotron import SHAPE as NANOTRON_SHAPE
from pentode.checkpoint.nanotron import is_nanotron_folder, nanotron_folder, nanotron_shape, nanotron_weights
from pentode.checkpoint.stored import Weights
from pentode.config.kinds.shape import Shape
from pentode.config.load import load_config
from pentode.config.schema import Config
from pentode.dist.mesh import Mesh
from pentode.errors import CheckpointError, ConfigError
from pentode.models.registry import model_for
from pentode.nn.causal_lm import CausalLM, Part
from pentode.parallel.spec import ParamSpec, specs_of
from pentode.run.bare_config import shape_of

Kind = Literal["pentode", "hf", "nanotron"]
PENTODE: Kind = "pentode"
HF: Kind = "hf"
NANOTRON: Kind = "nanotron"

# Fields of a shape that weights do not hang on: they say how to train, or what to write into exported models.
FREE = {"bos_token_id", "eos_token_id", "pad_token_id", "z_loss_enabled", "z_loss_coefficient"}
FREE |= {"resid_pdrop", "embd_pdrop", "attn_pdrop"}
STRETCHED = {"rope_theta", "rope_scaling", "max_position_embeddings"}  # changed on purpose where texts become longer
ALIKE = {"gelu_pytorch_tanh": "gelu_new"}


@dataclass(frozen=True)
class Existing:
    """The weights of a model in a folder.

    shape       of the model, as the folder says it
    said_by     the file that says so
    weights     where they lie; headers alone were read so far
    checkpoint  that they are of, where they are Pentode's
    """

    kind: Kind
    shape: Shape
    said_by: Path
    weights: Weights
    checkpoint: Checkpoint | None = None


def kind_of(path: Path) -> Kind:
    """What a folder is; CheckpointError where it holds no model."""
    inside = steps(path)
    if (path / MANIFEST).exists() or any((step / MANIFEST).exists() for step in inside):
        return PENTODE
    if is_hf_folder(path):
        return HF
    if is_nanotron_folder(path):
        return NANOTRON
    if inside:
        return PENTODE  # a run's, whose checkpoints are all damaged
    raise CheckpointError(
        f"{path}: neither a checkpoint, nor a run with one, nor a Hugging Face folder with config.json and "
        "model.safetensors, nor Nanotron's; give one of them"
    )


def open_existing(
    path: Path, *, kind: Kind | None = None, masters: bool = False, checkpoint: Checkpoint | None = None
) -> Existing:
    """Find the weights in a folder: a checkpoint's, a run's (its newest), or another library's.

    kind        what it is; None: as its files tell
    masters     of a checkpoint, take the masters that its weights were rounded from
    checkpoint  that was found there, if it was

    Raises CheckpointError or ConfigError, a line, where they are not there whole or are those of a model not built.
    """
    kind = kind or (PENTODE if checkpoint else kind_of(path))
    if kind == PENTODE:
        checkpoint = checkpoint or find_checkpoint(path)
        checkpoint.file("config.yaml")  # proves its checksum
        said_by = checkpoint.folder / "config.yaml"
        shape, weights = load_config(said_by).model.model_config, weights_of(checkpoint, masters=masters)
        existing = Existing(kind, shape, said_by, weights, checkpoint)
    elif kind == HF:
        said_by, shape = path / CONFIG, hf_shape(path)
        shape_of(asdict(shape), said_by=said_by)  # pyright: ignore[reportArgumentType]
        weights = hf_weights(path, model_for(shape).HF_NAMES, tied=shape.tied)
        existing = Existing(kind, shape, said_by, weights)
    else:
        folder = nanotron_folder(path)
        said_by = folder / NANOTRON_SHAPE
        shape = shape_of(nanotron_shape(folder), said_by=said_by)
        names = getattr(model_for(shape), "NANOTRON_NAMES", None)
        if names is None:
            raise ConfigError([f"{said_by}: it describes a {_word(shape, 'type')}, which is not read from Nanotron"])
        existing = Existing(kind, shape, said_by, nanotron_weights(folder, names, tied=shape.tied))
    existing.weights.compare(specs_of_shape(shape))
    return existing


def source_of(config: Config, path: Path, *, checkpoint: Checkpoint | None = None) -> Existing:
    """The existing weights that a run of this config begins with; ConfigError where their model has another shape."""
    existing = open_existing(path, masters=True, checkpoint=checkpoint)
    found = contradictions(config.model.model_config, existing.shape, said_by=existing.said_by)
    if found:
        raise ConfigError(found)
    return existing


def weights_for(model: CausalLM, existing: Existing) -> Iterator[tuple[str, Tensor]]:
    """The part of existing weights that a model's stage holds, one at a time with its name, in at least float32.

    Each is read alone, and no more of it than the stage holds. Padding is zero.
    """
    specs = specs_of(model)
    for name, parameter in model.named_parameters():
        values = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        existing.weights.read(name, Saved.of(values, specs[name].global_shape, specs[name].boxes()))
        yield name, values


def contradictions(ours: Shape, theirs: Shape, *, said_by: Path) -> list[str]:
    """What of a config's shape is not so in the folder that its weights come from, a line each."""
    where = "model.model_config"
    if type(ours) is not type(theirs):
        return [f"{where}.type: {_word(ours, 'type')}, but {said_by} describes a {_word(theirs, 'type')}"]
    names = [field.name for field in fields(ours) if field.name not in FREE | STRETCHED]  # pyright: ignore[reportArgumentType]
    return [
        f"{where}.{name}: {_word(ours, name)}, but {said_by} says {_word(theirs, name)}; make them the same"
        for name in names
        if getattr(ours, name) != getattr(theirs, name) and _word(ours, name) != _word(theirs, name)
    ]


def stretches(ours: Shape, theirs: Shape, *, said_by: Path) -> list[str]:
    """What a config changes of the positions that existing weights were trained on, a line each."""
    names = [field.name for field in fields(ours) if field.name in STRETCHED]  # pyright: ignore[reportArgumentType]
    return [
        f"model.model_config.{name}: {getattr(ours, name)}, where {said_by} says {getattr(theirs, name)}"
        for name in names
        if getattr(ours, name) != getattr(theirs, name)
    ]


def specs_of_shape(shape: Shape) -> dict[str, ParamSpec]:
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


def _word(shape: Shape, name: str) -> object:
    """A field's value, in one form where several mean the same."""
    value = getattr(shape, name)
    if value is None:
        value = {shape.KV_HEADS: shape.kv_heads, "n_inner": shape.ffn_width}.get(name)
    return ALIKE.get(value, value) if isinstance(value, str) else value
