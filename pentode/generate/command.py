"""Generation from a folder: reads the config, weights and tokenizer of a checkpoint, and continues prompts."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pentode import device as devices
from pentode.checkpoint.layout import MANIFEST, Saved
from pentode.checkpoint.load import Checkpoint, newest, open_checkpoint
from pentode.config.load import load_config
from pentode.config.schema import Config
from pentode.data.tokenizer import OURS, THEIRS, Tokenizer, load_tokenizer
from pentode.dist.mesh import Mesh
from pentode.errors import CheckpointError
from pentode.generate.engine import Sampling
from pentode.generate.text import continue_text
from pentode.run.build import build_model


def generate_from(path: Path, prompts: Sequence[str], *, sampling: Sampling, device: str = "auto") -> Iterator[str]:
    """Each prompt continued by the model of a checkpoint's folder, or of a run's folder: its newest checkpoint."""
    checkpoint = _checkpoint(path)
    config, tokenizer = _config(checkpoint), _tokenizer(checkpoint)
    place = devices.pick(device)
    model = build_model(config, Mesh.single(), place)
    weights = {name: Saved(p.detach(), p.spec.global_shape, p.spec.boxes()) for name, p in model.named_parameters()}
    checkpoint.read("weights", weights)
    for prompt in prompts:
        yield continue_text(
            model,
            tokenizer,
            prompt,
            sampling=sampling,
            max_positions=config.model.model_config.max_positions,
            device=place,
        )


def _checkpoint(path: Path) -> Checkpoint:
    if (path / MANIFEST).exists():
        return open_checkpoint(path)
    found = newest(path) if path.is_dir() else None
    if found is None:
        raise CheckpointError(f"{path}: holds no checkpoint; give the folder of a checkpoint, or of a run")
    return found


def _config(checkpoint: Checkpoint) -> Config:
    checkpoint.file("config.yaml")  # proves its checksum
    return load_config(checkpoint.folder / "config.yaml")


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    files = [name for name in (OURS, *THEIRS) if name in checkpoint.manifest.files]
    if not files:
        raise CheckpointError(
            f"{checkpoint}: it has no tokenizer, since it was trained on dummy data; it writes no text"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name in files:
            (Path(folder) / name).write_bytes(checkpoint.file(name))
        return load_tokenizer(folder)
