"""Generation from a folder: reads the config, weights and tokenizer of a checkpoint, and continues prompts."""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pentode import device as devices
from pentode import log
from pentode.checkpoint.layout import MANIFEST, Saved
from pentode.checkpoint.load import Checkpoint, newest, open_checkpoint
from pentode.config.load import load_config
from pentode.config.schema import Config
from pentode.data.tokenizer import OURS, THEIRS, Tokenizer, load_tokenizer
from pentode.dist.mesh import Mesh
from pentode.errors import CheckpointError
from pentode.generate.sampling import Sampling
from pentode.generate.text import continue_text
from pentode.run.build import build_model

RULE = "-" * 40


def generate_from(path: Path, prompts: Sequence[str], *, sampling: Sampling, device: str = "auto") -> Iterator[str]:
    """What `pentode generate` prints: each prompt continued by the model in `path`, and a rule between two of them.

    `path` is a checkpoint's folder, or a run's: its newest checkpoint. Each prompt has a seed of its own, so that one
    given twice is continued in two ways.
    """
    log.setup(level="warning", stream=sys.stderr)  # stdout is for the texts
    checkpoint = _checkpoint(path)
    config, tokenizer = _config(checkpoint), _tokenizer(checkpoint)
    place = devices.pick(device)
    model = build_model(config, Mesh.single(), place)
    weights = {name: Saved(p.detach(), p.spec.global_shape, p.spec.boxes()) for name, p in model.named_parameters()}
    checkpoint.read("weights", weights)
    for number, prompt in enumerate(prompts):
        if number > 0:
            yield RULE
        own = replace(sampling, seed=sampling.seed + number)
        text = continue_text(model, tokenizer, prompt, config=config, sampling=own, device=place)
        yield log.printable(text) if sys.stdout.isatty() else text  # an untrained model may write anything


def _checkpoint(path: Path) -> Checkpoint:
    if (path / MANIFEST).exists():
        return open_checkpoint(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give the folder of a checkpoint, or of a run")
    found = newest(path)
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
            f"{checkpoint}: has no tokenizer, so it was trained on dummy data; give one trained on text"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name in files:
            (Path(folder) / name).write_bytes(checkpoint.file(name))
        return load_tokenizer(folder)
