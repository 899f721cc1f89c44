"""Generation from a folder: reads the config, weights and tokenizer of a checkpoint, and continues prompts."""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pentode import device as devices
from pentode import log
from pentode.checkpoint.folder import Checkpoint, find_checkpoint
from pentode.checkpoint.layout import Saved
from pentode.checkpoint.load import read_tensors
from pentode.config.check import problems
from pentode.config.load import load_config
from pentode.config.schema import Config
from pentode.data.tokenizer import OURS, THEIRS, Tokenizer, load_tokenizer
from pentode.dist import launch
from pentode.dist.collectives import gather_objects
from pentode.dist.mesh import everyone
from pentode.dist.p2p import connect
from pentode.errors import CheckpointError, ConfigError
from pentode.generate.engine import Speaker
from pentode.generate.sampling import Sampling
from pentode.generate.text import continue_text, first_ids
from pentode.run.build import build_mesh, build_stages, names_of_model

RULE = "-" * 40


def generate_from(
    path: Path, prompts: Sequence[str], *, sampling: Sampling, device: str = "auto", tp: int = 1, pp: int = 1
) -> Iterator[str]:
    """What `pentode generate` prints: each prompt continued by the model in `path`, and a rule between two of them.

    `path` is a checkpoint's folder, or a run's: its newest checkpoint. Each prompt has a seed of its own, so that one
    given twice is continued in two ways. With tp * pp processes, all of them call, and the first one gives the texts.
    """
    here = launch.world()
    log.setup(level="warning", rank=here.rank, stream=sys.stderr)  # stdout is for the texts
    checkpoint = find_checkpoint(path)
    config, tokenizer = _config(checkpoint, tp=tp, pp=pp, world_size=here.size), _tokenizer(checkpoint)
    place = devices.pick(device, local_rank=here.local_rank)
    launch.connect(here, backend=devices.backend(place), device=place)
    try:
        speaker = _speaker(checkpoint, config, place)
        for number, prompt in enumerate(prompts):
            if not all(gather_objects(True, everyone())):
                return
            own = replace(sampling, seed=sampling.seed + number)
            text = continue_text(speaker, tokenizer, prompt, config=config, sampling=own, device=place)
            if here.rank == 0:
                try:
                    yield from [RULE] if number > 0 else []
                    yield log.printable(text) if sys.stdout.isatty() else text  # an untrained model may write anything
                except GeneratorExit:  # the reader has seen enough, as in `| head`, and the others must hear of it
                    if number + 1 < len(prompts):
                        gather_objects(False, everyone())
                    raise
    finally:
        launch.disconnect()


def refuse_early(path: Path, prompts: Sequence[str], *, tp: int, pp: int) -> None:
    """Raise what is wrong with checkpoint, layout or prompts, once: processes that are started would all say it."""
    checkpoint = find_checkpoint(path)
    config, tokenizer = _config(checkpoint, tp=tp, pp=pp, world_size=tp * pp), _tokenizer(checkpoint)
    for prompt in prompts:
        first_ids(tokenizer, prompt, vocab_size=config.model.model_config.vocab_size)


def _speaker(checkpoint: Checkpoint, config: Config, device: torch.device) -> Speaker:
    """The model of the checkpoint, this rank's part of it."""
    mesh = build_mesh(config)
    stages = build_stages(config, mesh, device, training=False)
    parameters = {name: p for stage in stages.values() for name, p in stage.named_parameters()}
    weights = {name: Saved.of(p.detach(), p.spec.global_shape, p.spec.boxes()) for name, p in parameters.items()}
    read_tensors(checkpoint, "weights", weights, names=names_of_model(stages, mesh))
    return Speaker(stages, mesh, connect(mesh.pp, device=device), tuple(range(mesh.pp.size)))


def _config(checkpoint: Checkpoint, *, tp: int, pp: int, world_size: int) -> Config:
    """The checkpoint's config, in another layout: without what only training does, so that its rules do not bind."""
    checkpoint.file("config.yaml")  # proves its checksum
    layout = {"dp": 1, "tp": tp, "pp": pp, "pp_engine": "afab", "pp_stages_per_rank": 1, "context_parallel_size": 1}
    layout |= {"tp_mode": "ALL_REDUCE", "tp_linear_async_communication": "false"}
    overrides = [f"parallelism.{key}={value}" for key, value in layout.items()]
    overrides += ["model.float8=null", "model.cuda_graph=auto"]
    config = load_config(checkpoint.folder / "config.yaml", overrides)
    found = problems(config, world_size=world_size)
    if found:
        raise ConfigError(found)
    return config


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
