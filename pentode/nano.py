"""The small front door: the nanoGPT2 guide's four names, on the same model, step and checkpoints as everything else.

config = get_config("nano")
train_set, val_set = CharDataset(text, config.block_size).split(0.9)
model = GPT(config)
Trainer(model, config).train(train_set, val_set)
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import harmonic_mean
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentode import device as devices
from pentode import log
from pentode.checkpoint.folder import Checkpoint, newest
from pentode.checkpoint.lock import locked
from pentode.checkpoint.save import clean
from pentode.config.load import config_from_dict
from pentode.config.schema import Config
from pentode.data.open import StageData
from pentode.data.tokenizer import CharTokenizer
from pentode.data.windows import Windows, fingerprint_of
from pentode.dist.launch import World
from pentode.dist.mesh import Mesh
from pentode.errors import ConfigError
from pentode.generate.engine import generate
from pentode.generate.sampling import Sampling
from pentode.metrics.jsonl import JsonLines
from pentode.metrics.record import Record
from pentode.metrics.sinks import Sinks
from pentode.parallel.batch import Batch
from pentode.report.page import write_report
from pentode.run.build import Run, assemble, build_stages, initial_weights
from pentode.run.feed import Feed
from pentode.train.loop import train
from pentode.train.signals import StopSignal
from pentode.train.state import TrainState, restore

SHAPE = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
SAMPLE_NUMBERS = 2**62  # drawn from for samples that have no number in a run


@dataclass(slots=True)
class NanoConfig:
    """The guide's keys, with the values of configs/nano.yaml; files of these keys are what train.py reads.

    vocab_size   characters that the model knows; a text may have fewer
    device       auto (a GPU where there is one), or as `general.device` in a config
    eval_iters   batches of one validation
    """

    vocab_size: int = 256
    block_size: int = 128
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 64
    dropout: float = 0.0
    batch_size: int = 64
    learning_rate: float = 1e-3
    max_iters: int = 5000
    eval_iters: int = 100
    eval_interval: int = 500
    device: str = "auto"
    mixed_precision: bool = False
    save_checkpoint: bool = True
    checkpoint_interval: int = 1000
    checkpoint_dir: str = "./checkpoints/nano"

    def full(self) -> Config:
        """The same in the full schema; raises ConfigError for values that make no sense."""
        return config_from_dict(asdict(self))


torch.serialization.add_safe_globals([NanoConfig])  # torch.load reads one beside weights, as the guide saves them

PRESETS = {
    "nano": NanoConfig(),
    "small": NanoConfig(
        block_size=256,
        n_layer=6,
        n_head=6,
        n_embd=384,
        dropout=0.2,
        eval_iters=50,
        eval_interval=250,
        checkpoint_dir="./checkpoints/small",
    ),
    "base": NanoConfig(
        block_size=1024,
        n_layer=12,
        n_head=12,
        n_embd=768,
        dropout=0.1,
        batch_size=12,
        learning_rate=6e-4,
        max_iters=100_000,
        eval_iters=50,
        eval_interval=1000,
        mixed_precision=True,
        checkpoint_interval=5000,
        checkpoint_dir="./checkpoints/base",
    ),
}


def get_config(name: str) -> NanoConfig:
    """A preset by name: nano, small or base, as in configs/; change its fields as you like."""
    if name not in PRESETS:
        raise ConfigError([f"get_config: {name!r} is not one of {', '.join(PRESETS)}"])
    return replace(PRESETS[name])


class CharDataset(torch.utils.data.Dataset):
    """A text by its characters: item i is (x, y), two int64 [block_size] that begin at characters i and i + 1."""

    def __init__(self, text: str, block_size: int, *, tokenizer: CharTokenizer | None = None) -> None:
        self.tokenizer = tokenizer or CharTokenizer.of(text)
        self.text, self.block_size = text, block_size
        self.vocab_size = self.tokenizer.vocab_size
        self.data = self.tokenizer.encode(text)

    def __len__(self) -> int:
        return max(len(self.data) - self.block_size, 0)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(f"CharDataset: item {i} of {len(self)}")
        row = torch.from_numpy(self.data[i : i + self.block_size + 1].astype(np.int64))
        return row[:-1], row[1:]

    def split(self, fraction: float) -> tuple[Self, Self]:
        """The first `fraction` of the text and the rest, over the same characters."""
        at = round(len(self.text) * fraction)
        parts = self.text[:at], self.text[at:]
        first, last = (type(self)(part, self.block_size, tokenizer=self.tokenizer) for part in parts)
        return first, last

    def encode(self, text: str) -> list[int]:
        """Characters to ids."""
        return self.tokenizer.encode(text).tolist()

    def decode(self, ids: list[int] | Tensor) -> str:
        """Ids to characters."""
        return self.tokenizer.decode(ids.tolist() if isinstance(ids, Tensor) else ids)


class GPT(nn.Module):
    """GPT-2 with freshly initialised weights; `core` is the library's own model."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ConfigError([f"vocab_size: {config.vocab_size}; set config.vocab_size = dataset.vocab_size"])
        self.config = replace(config)
        full = config.full()
        (self.core,) = build_stages(full, Mesh.single(), devices.pick(full.general.device)).values()
        for name, weight in initial_weights(full, self.core):
            self.core.get_parameter(name).data.copy_(weight)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits [B, T, vocabulary] for what follows each of idx [B, T], and their mean loss against targets [B, T]."""
        rows, length = idx.shape
        largest = int(idx.max())
        if length > self.config.block_size or largest >= self.config.vocab_size:
            raise ValueError(
                f"GPT: {length} tokens with ids up to {largest}, but block_size is {self.config.block_size} and "
                f"vocab_size {self.config.vocab_size}"
            )
        positions = torch.arange(length, device=idx.device).repeat(rows)
        samples = torch.randint(SAMPLE_NUMBERS, (rows,), device=idx.device)  # new dropout masks at each call
        logits = self.core.logits(None, Batch(idx.flatten(), idx.flatten(), positions, samples))  # [B * T, vocabulary]
        loss = None if targets is None else F.cross_entropy(logits.float(), targets.flatten())
        return logits.unflatten(0, (rows, length)), loss

    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, *, seed: int = 42
    ) -> Tensor:
        """Continue idx [B, T] by `max_new_tokens` tokens -> [B, T + max_new_tokens]."""
        sampling = Sampling(max_new_tokens, temperature, top_k, seed=seed)
        return generate(self.core, idx.to(self.device), sampling=sampling, max_positions=self.config.block_size)


class Trainer:
    """Trains a GPT on one CharDataset and validates it on another.

    Checkpoints and metrics.jsonl go to `config.checkpoint_dir`. Where that holds a run, `resume` goes on with it, and
    is needed. `save_checkpoint` False writes nothing.
    """

    def __init__(self, model: GPT, config: NanoConfig, *, resume: bool = False) -> None:
        self.model, self.config, self.resume = model, config, resume

    def train(self, train_dataset: CharDataset, val_dataset: CharDataset | None = None) -> None:
        """Train until `max_iters`, printing a line every `eval_interval` iterations and after the last.

        It is a copy of the model that is trained, in the buffers that training keeps weights in; its weights come back
        however training ends.
        """
        config = self.config.full()
        found = [*self._differences(), *self._misfits("train_dataset", train_dataset)]
        if isinstance(config.checkpoints.checkpoints_path, str):
            found.append(f"checkpoint_dir: {self.config.checkpoint_dir!r} is for `pentode train`; use a local folder")
        if val_dataset is not None:
            found += self._misfits("val_dataset", val_dataset)
        if found:
            raise ConfigError(found)
        log.setup(level="error")
        root = config.checkpoints.folder
        data = _stage_data(train_dataset, val_dataset)
        with locked(root) if self.config.save_checkpoint else nullcontext():
            self._train_in(root, config, data)

    def _train_in(self, root: Path, config: Config, data: StageData) -> None:
        device, mesh = devices.pick(config.general.device), Mesh.single()
        checkpoint = self._checkpoint(root)
        feed = Feed(config, mesh, device, data=data)
        stages = build_stages(config, mesh, device)
        (core,) = stages.values()
        core.load_state_dict(self.model.core.state_dict())
        run = assemble(config, World(), mesh, device, feed, stages)
        state = TrainState() if checkpoint is None else restore(run, checkpoint)
        if state.order_keys.get(feed.stage.name, feed.order_key) != feed.order_key:
            raise ConfigError([f"checkpoint_dir: the run in {root} was trained on another text; use another folder"])
        try:
            self._train(run, state, root, saved=checkpoint is not None)
        finally:
            feed.close()
            self.model.core.load_state_dict(core.state_dict())

    def _train(self, run: Run, state: TrainState, root: Path, *, saved: bool) -> None:
        if state.step >= self.config.max_iters:
            print(f"iter {state.step}: complete; raise config.max_iters to go on")
            return
        saves = self.config.save_checkpoint
        printer = IterationPrinter(self.config.eval_interval, self.config.max_iters)
        sinks = Sinks([printer, JsonLines(root, resume_step=state.step)] if saves else [printer])
        stop = StopSignal(self.model.device)
        views = [write_report] if saves else []
        with stop if saves else nullcontext():  # with nothing to save, Ctrl-C stops at once
            sinks.start({})
            try:
                with stop.until_saved():
                    train(run, state, root=root, sinks=sinks, stop=stop, saved=saved, after_save=views)
            finally:
                sinks.close("closed")

    def _checkpoint(self, root: Path) -> Checkpoint | None:
        """What to go on from."""
        if self.config.save_checkpoint:
            clean(root)
        found = newest(root, quarantine=self.resume) if self.config.save_checkpoint or self.resume else None
        if found is not None and not self.resume:
            raise ConfigError([f"checkpoint_dir: {root} holds a run; use another folder, or Trainer(..., resume=True)"])
        return found

    def _differences(self) -> Iterator[str]:
        for name in SHAPE:
            built, asked = getattr(self.model.config, name), getattr(self.config, name)
            if built != asked:
                yield f"{name}: {asked}, but the model was built with {built}; set it before GPT(config)"

    def _misfits(self, name: str, dataset: CharDataset) -> Iterator[str]:
        config = self.config
        if not isinstance(dataset, CharDataset):
            yield f"{name}: a {type(dataset).__name__}; give a CharDataset(text, config.block_size)"
        elif dataset.block_size != config.block_size:
            yield f"block_size: {name} has {dataset.block_size}, the config {config.block_size}; make them equal"
        elif dataset.vocab_size > config.vocab_size:
            yield (
                f"vocab_size: {name} has {dataset.vocab_size} characters, the model knows {config.vocab_size}; set "
                "config.vocab_size = dataset.vocab_size before GPT(config)"
            )


class IterationPrinter:
    """Prints `iter 100: train loss 4.1234, val loss 4.1567 (time: 23.45s)`, and tokens/s since the last such line."""

    def __init__(self, interval: int, last: int) -> None:
        self.interval, self.last = interval, last
        self.began = time.perf_counter()
        self.speeds: list[float] = []

    def start(self, info: dict[str, object]) -> None:
        """Nothing is said before the first line."""

    def log(self, record: Record) -> None:
        """Print the line of an iteration whose turn it is."""
        self.speeds.append(record.tokens_per_sec)
        if record.step != self.last and (self.interval <= 0 or record.step % self.interval):
            return
        validation = "" if record.val_loss is None else f", val loss {record.val_loss:.4f}"
        seconds, speed = time.perf_counter() - self.began, harmonic_mean(self.speeds)  # steps have equally many tokens
        self.speeds.clear()
        print(
            f"iter {record.step}: train loss {record.lm_loss:.4f}{validation} (time: {seconds:.2f}s) "
            f"{speed:,.0f} tokens/s",
            flush=True,
        )

    def close(self, status: str) -> None:
        """Nothing is said after the last line."""


def _stage_data(train_dataset: CharDataset, val_dataset: CharDataset | None) -> StageData:
    """Both as sources of windows; the validation text is read by the training text's characters."""
    tokenizer = train_dataset.tokenizer
    if val_dataset is not None and val_dataset.tokenizer.fingerprint != tokenizer.fingerprint:
        val_dataset = CharDataset(val_dataset.text, val_dataset.block_size, tokenizer=tokenizer)
    training, validation = _windows(train_dataset, name="train_dataset", stride=1), None
    if val_dataset is not None:
        validation = _windows(val_dataset, name="val_dataset", stride=val_dataset.block_size)
    return StageData(training, validation, tokenizer)


def _windows(dataset: CharDataset, *, name: str, stride: int) -> Windows:
    facts: dict[str, Any] = {
        "sequence_length": dataset.block_size,
        "vocab_size": dataset.vocab_size,
        "largest_id": int(dataset.data.max(initial=0)),
        "fingerprint": fingerprint_of(dataset.tokenizer.fingerprint, dataset.data.tobytes()),
    }
    return Windows(dataset.data, name=name, stride=stride, **facts)
