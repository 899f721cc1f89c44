"""Small checkpoints that go to a bucket in parts, and come back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pentode.checkpoint import objects
from pentode.checkpoint.layout import Saved
from pentode.checkpoint.remote import Remote
from pentode.checkpoint.retry import Clock
from pentode.checkpoint.save import save
from tests.helpers.object_store import Bucket, FakeTime, Plan, Proxy, bucket, smaller_parts

KIB = 2**10
WEIGHTS = "weights-00000-of-00001.safetensors"  # of `checkpoint`, three parts


@contextmanager
def bucket_in_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket, into which files of more than 16 KiB go in parts."""
    monkeypatch.setattr(objects, "PART", 16 * KIB)
    smaller_parts(monkeypatch)
    with bucket(monkeypatch) as made:
        yield made


def checkpoint(root: Path, step: int, *, kib: int = 40, seed: int = 0) -> Path:
    """A checkpoint of one tensor of so many KiB."""
    tensor = torch.randn(kib * KIB // 4, generator=torch.Generator().manual_seed(seed))
    groups = {"weights": {"w": Saved((len(tensor),), [((0,), tensor)])}}
    return save(root, step=step, groups=groups, state={"train": {"consumed_samples": step}})


def remote_of(store: Bucket, time: FakeTime | None = None, **more: float) -> Remote:
    """The store, with a clock that nobody waits for."""
    time = time or FakeTime()
    return Remote(store.url, clock=Clock(time.now, time.wait), **more)


def upload(remote: Remote, folder: Path) -> None:
    """Send a checkpoint."""
    remote.upload(folder, remote.patience(folder.name))


def fetch(remote: Remote, step: int, root: Path) -> Path | None:
    """Fetch one into a run's folder."""
    return remote.fetch(step, root, remote.patience(step))


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def whole(store: Bucket, folder: Path) -> bool:
    """Whether the store has this checkpoint, all of it, bit for bit."""
    return {name.split("/")[1]: store.read(name) for name in store.names()} == contents(folder)


def through(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """A proxy that new connections go through."""
    proxy = Proxy(plan)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    return proxy


def flip(path: Path) -> None:
    """Change a bit of a file."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)


def flip_object(store: Bucket, name: str) -> None:
    """Change a bit of an object."""
    data = bytearray(store.read(name))
    data[-5] ^= 16
    store.change(name, bytes(data))
