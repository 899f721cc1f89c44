"""What a run's first step needs of packages of kernels, loaded in threads while its model is built."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from pentode import device as devices
from pentode.config.schema import Config
from pentode.ops import flash, fused_products
from pentode.ops.kernel_package import KernelPackage
from pentode.run import compiled


@contextmanager
def loading_ahead(config: Config, device: torch.device) -> Iterator[None]:
    """Begin to load, on a GPU, what blocks that are not compiled will ask for; when left, begin no more of it.

    Python can import while the main thread is in a call of CUDA's, and hash Triton's library of some hundred megabytes
    beside all else. Nothing is left to be imported while Python ends, which would fail.
    """
    if not devices.is_gpu(device) or config.model.compile == "off" or compiled.is_wanted(config, device):
        yield
        return
    threads = ThreadPoolExecutor(2, thread_name_prefix="load-ahead")
    threads.submit(_compute_tritons_key)
    for package in packages(config):
        package.load_in(threads, device)
    threads.shutdown(wait=False)  # when all is done they end
    try:
        yield
    finally:
        threads.shutdown(cancel_futures=True)


def packages(config: Config) -> list[KernelPackage[Any]]:
    """Those for which something in this model is large enough."""
    if config.model.dtype != "bfloat16":
        return []
    shape, tokens = config.model.model_config, config.tokens
    widest = max(2 * shape.ffn_width, shape.vocab_size) // config.parallelism.tp  # gate and up, or the head
    product = tokens.micro_batch_size * tokens.sequence_length * shape.width * widest
    large = [(fused_products.PACKAGE, product >= fused_products.LARGE), (flash.PACKAGE, compiled.attends_long(config))]
    return [package for package, is_large in large if is_large]


def _compute_tritons_key() -> None:
    """Triton keeps it: it is a part of the names of all kernels that it has on disk. What fails here does so there."""
    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # no Triton, or a version that has none: it says so itself where it is needed
        return
    triton_key()
