"""The small front door: the nanoGPT2 guide's four names, on the same model, step and checkpoints as everything else.

config = get_config("nano")
train_set, val_set = CharDataset(text, config.block_size).split(0.9)
model = GPT(config)
Trainer(model, config).train(train_set, val_set)
"""

import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from pentode import device as devices
from pentode import log
from pentode.checkpoint.load import newest
from pentode.config.load import config_from_dict
from pentode.config.schema import Config
from pentode.data.open import StageData
from pentode.data.tokenizer import CharTokenizer
from pentode.data.windows import Windows, fingerprint_of
from pentode.dist.launch import World
from pentode.dist.mesh import Mesh
from pentode.errors import ConfigError
from pentode.generate.engine import Sampling, generate
from pentode.metrics.jsonl import JsonLines
from pentode.metrics.record import Record
from pentode.metrics.sinks import Sinks
from pentode.run.build import assemble, build_model, initial_weights
from pentode.run.feed import Feed
from pentode.train.loop import train
from pentode.train.signals import StopSignal
from pentode.train.state import TrainState, restore


@dataclass
class NanoConfig:
    """The guide's keys; configs/*.yaml are written in them."""

    vocab_size: int = 256
    block_size: int = 128
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 64
    dropout: float = 0.1
    batch_size: int = 64
    learning_rate: float = 1e-3
    max_iters: int = 5000
    eval_iters: int = 100
    eval_interval: int = 500
    device: str = "auto"
    mixed_precision: bool = False
    save_checkpoint: bool = True
    checkpoint_interval: int = 1000
    checkpoint_dir: str = "./checkpoints"

    def full(self) -> Config:
        """The same in the full schema; raises ConfigError for values that make no sense."""
        return config_from_dict(asdict(self))


PRESETS = {
    "nano": NanoConfig(),
    "small": NanoConfig(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2),
    "base": NanoConfig(block_size=1024, n_layer=12, n_head=12, n_embd=768, batch_size=12, learning_rate=6e-4),
}


def get_config(name: str) -> NanoConfig:
    """A preset by name: nano, small or base; change its fields as you like."""
    if name not in PRESETS:
        raise ValueError(f"get_config: {name!r} is not one of {', '.join(PRESETS)}")
    return replace(PRESETS[name])


class CharDataset(torch.utils.data.Dataset):
    """A text by its characters: item i is (x, y), two int64 [block_size] that begin at characters i and i + 1."""

    def __init__(self, text: str, block_size: int, *, tokenizer: CharTokenizer | None = None) -> None:
        self.tokenizer = tokenizer or CharTokenizer.of(text)
        self.text, self.block_size = text, block_size
        self.vocab_size = self.tokenizer.vocab_size
        self.data = self.tokenizer.encode(text)

    def __len__(self) -> int:
        return len(self.data) - self.block_size

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
        self.config = config
        full = config.full()
        self.device = devices.pick(full.general.device)
        self.core = build_model(full, Mesh.single(), self.device)
        for name, weight in initial_weights(full, self.core).items():
            self.core.get_parameter(name).data.copy_(weight)

    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, *, seed: int = 42
    ) -> Tensor:
        """Continue idx [B, T] by `max_new_tokens` tokens -> [B, T + max_new_tokens]."""
        sampling = Sampling(max_new_tokens, temperature, top_k, seed=seed)
        return generate(self.core, idx.to(self.device), sampling=sampling, max_positions=self.config.block_size)


class Trainer:
    """Trains a GPT on one CharDataset and validates it on another.

    Checkpoints and metrics.jsonl go to `config.checkpoint_dir`; a folder that holds a run is only gone on with, and only
    if `resume` is asked for. `save_checkpoint` False writes nothing.
    """

    def __init__(self, model: GPT, config: NanoConfig, *, resume: bool = False) -> None:
        self.model, self.config, self.resume = model, config, resume

    def train(self, train_dataset: CharDataset, val_dataset: CharDataset | None = None) -> None:
        """Train until `max_iters`, printing a line every `eval_interval` iterations."""
        config = self.config.full()
        if train_dataset.vocab_size > self.config.vocab_size:
            raise ConfigError(
                [
                    f"vocab_size: the text has {train_dataset.vocab_size} characters, the model {self.config.vocab_size}; "
                    "set config.vocab_size = train_dataset.vocab_size before GPT(config)"
                ]
            )
        root = config.checkpoints.checkpoints_path
        checkpoint = newest(root) if self.config.save_checkpoint else None
        if checkpoint is not None and not self.resume:
            raise ConfigError([f"checkpoint_dir: {root} holds a run; use another folder, or Trainer(..., resume=True)"])
        mesh = Mesh.single()
        feed = Feed(config, mesh, self.model.device, data=_stage_data(train_dataset, val_dataset))
        run = assemble(config, World(), mesh, self.model.device, feed, self.model.core)
        state = TrainState() if checkpoint is None else restore(run, checkpoint)
        sinks = [IterationPrinter(self.config.eval_interval, self.config.max_iters)]
        if self.config.save_checkpoint:
            sinks.append(JsonLines(root, resume_step=state.step))
        log.setup(level="error")
        with StopSignal() as stop:
            opened = Sinks(sinks)
            opened.start({"run": config.general.run})
            try:
                train(run, state, root=root, sinks=opened, stop=stop)
            finally:
                opened.close("closed")
                run.feed.close()


class IterationPrinter:
    """Prints `iter 100: train loss 4.1234, val loss 4.1567 (time: 23.45s)`, and tokens/s."""

    def __init__(self, interval: int, last: int) -> None:
        self.interval, self.last = interval, last
        self.began = time.perf_counter()

    def start(self, info: dict[str, object]) -> None:
        """Nothing is said before the first line."""

    def log(self, record: Record) -> None:
        """Print the line of an iteration whose turn it is."""
        if record.step % self.interval and record.step != self.last:
            return
        validation = "" if record.val_loss is None else f", val loss {record.val_loss:.4f}"
        seconds = time.perf_counter() - self.began
        speed = f"{record.tokens_per_sec:,.0f} tokens/s"
        print(f"iter {record.step}: train loss {record.lm_loss:.4f}{validation} (time: {seconds:.2f}s) {speed}")

    def close(self, status: str) -> None:
        """Nothing is said after the last line."""


def _stage_data(train_dataset: CharDataset, val_dataset: CharDataset | None) -> StageData:
    def windows(dataset: CharDataset, *, name: str, stride: int) -> Windows:
        facts: dict[str, Any] = {
            "sequence_length": dataset.block_size,
            "vocab_size": dataset.vocab_size,
            "largest_id": int(dataset.data.max(initial=0)),
            "fingerprint": fingerprint_of(dataset.tokenizer.fingerprint, dataset.data.tobytes()),
        }
        return Windows(dataset.data, name=name, stride=stride, **facts)

    validation = val_dataset and windows(val_dataset, name="val_dataset", stride=val_dataset.block_size)
    return StageData(windows(train_dataset, name="train_dataset", stride=1), validation, train_dataset.tokenizer)
