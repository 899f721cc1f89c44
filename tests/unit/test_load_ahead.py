"""What a first step needs is loaded in threads, where it will be asked for, and whoever asks waits for it."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pentode import device as devices
from pentode.config.load import load_config
from pentode.config.schema import Config
from pentode.ops import flash, fused_products
from pentode.ops.kernel_package import KernelPackage
from pentode.run import ahead
from pentode.run.ahead import loading_ahead, packages
from pentode.train.start import start
from tests.helpers.tiny import tiny_yaml

GPU = torch.device("cuda", 0)
LLAMA: dict[str, Any] = {
    "type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": -1,
    "max_position_embeddings": 4096,
}
LARGE = {"tokens__sequence_length": 4096, "tokens__micro_batch_size": 4, "model__dtype": "bfloat16"}


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    def made(**changes: Any) -> Config:
        return load_config(tiny_yaml(tmp_path, model__model_config=dict(LLAMA), **(LARGE | changes)))

    return made


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads in which something was loaded, in the order in which it was; GPUs need not be there."""
    found: list[str] = []

    def load(package: object, device: torch.device) -> str:
        found.append(threading.current_thread().name)
        return "functions"

    monkeypatch.setattr("pentode.ops.kernel_package.KernelPackage._load", load)
    monkeypatch.setattr("pentode.ops.kernel_package.KernelPackage._version", lambda package, device: "1.2")
    monkeypatch.setattr("pentode.ops.kernel_package.keep_in_home", lambda: None)
    monkeypatch.setattr(devices, "use", lambda device: None)
    for package in (flash.PACKAGE, fused_products.PACKAGE):
        monkeypatch.setattr(package, "loaded", {})
        monkeypatch.setattr(package, "coming", {})
    return found


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ["quack-kernels", "flash-attn-4"]),
        ({"tokens__sequence_length": 512}, ["quack-kernels"]),
        ({"model__model_config__vocab_size": 128256, "tokens__sequence_length": 64}, ["quack-kernels"]),
        ({"model__model_config__intermediate_size": 64}, ["flash-attn-4"]),
        ({"model__model_config__intermediate_size": 64, "tokens__sequence_length": 512}, []),
        ({"model__dtype": "float32"}, []),
    ],
    ids=str,
)
def test_packages_are_those_for_which_something_is_large(
    config: Callable[..., Config], changes: dict[str, Any], wanted: list[str]
) -> None:
    assert [package.name for package in packages(config(**changes))] == wanted


def test_they_are_loaded_once_in_a_thread_and_waited_for(config: Callable[..., Config], threads: list[str]) -> None:
    for _ in range(2):
        with loading_ahead(config(), GPU):
            for package in (flash.PACKAGE, fused_products.PACKAGE):
                assert package.is_usable(GPU)
                assert package.on(GPU) == "functions"
        assert len(threads) == 2
        assert all(name.startswith("load-ahead") for name in threads)


def test_a_run_that_ends_early_leaves_nothing_to_be_loaded(
    config: Callable[..., Config], threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Barrier(3), threading.Event()

    def load(package: object, device: torch.device) -> str:
        begun.wait(60)
        may_end.wait(60)
        threads.append(threading.current_thread().name)
        return "functions"

    third = KernelPackage("third", generations=(9,), functions=int, does="Sums", instead="torch adds")
    monkeypatch.setattr("pentode.ops.kernel_package.KernelPackage._load", load)
    monkeypatch.setattr(ahead, "_compute_tritons_key", lambda: None)
    monkeypatch.setattr(ahead, "packages", lambda config: [flash.PACKAGE, fused_products.PACKAGE, third])

    def leave_early() -> None:
        with loading_ahead(config(), GPU):
            begun.wait(60)  # two are being loaded, and there is no thread for the third
            third.coming[0].add_done_callback(lambda _: may_end.set())
            raise KeyError

    with pytest.raises(KeyError):
        leave_early()
    assert len(threads) == 2, "what had begun was waited for"
    assert third.coming[0].cancelled()
    monkeypatch.setattr("pentode.ops.kernel_package.KernelPackage._load", lambda package, device: "later")
    assert third.is_usable(GPU)
    assert third.on(GPU) == "later"
    assert flash.PACKAGE.is_usable(GPU)
    assert flash.PACKAGE.on(GPU) == "functions"


@pytest.mark.parametrize(
    "changes",
    [{"model__compile": "off"}, {"model__compile": "on"}, {"parallelism__tp": 2}, {"general__device": "cpu"}],
    ids=str,
)
def test_nothing_is_loaded_for_blocks_that_do_not_ask(
    config: Callable[..., Config], threads: list[str], changes: dict[str, Any]
) -> None:
    with loading_ahead(config(**changes), torch.device("cpu") if "general__device" in changes else GPU):
        pass
    assert not flash.PACKAGE.coming
    assert not fused_products.PACKAGE.coming
    assert threads == []


def test_a_run_begins_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextmanager
    def noted(config: Config, device: torch.device) -> Iterator[None]:
        seen.append(f"{config.general.run} on {device}")
        yield
        seen.append("left")

    monkeypatch.setattr("pentode.train.start.loading_ahead", noted)
    start(load_config(tiny_yaml(tmp_path, tokens__train_steps=1)))
    assert seen == ["tiny on cpu", "left"]


def test_tritons_key_is_computed_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = pytest.importorskip("triton.runtime.cache")
    calls: list[int] = []
    monkeypatch.setattr(cache, "triton_key", lambda: calls.append(1))
    ahead._compute_tritons_key()
    assert calls == [1]
    monkeypatch.delattr(cache, "triton_key")
    ahead._compute_tritons_key()
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", None)
    ahead._compute_tritons_key()
