"""What `pentode doctor` tells: versions, devices, which kernels pass a small test here, and the settings about them."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pentode import device as devices
from pentode import log
from pentode.ops import flash, fused_products
from pentode.ops.feed_forward import swiglu_layer
from pentode.ops.gradient_sum import put_beside
from pentode.optim import fused
from pentode.version import VERSION

PACKAGES = ("torch", "numpy", "pydantic", "pyyaml", "typer", "rich", "tokenizers", "safetensors", "fsspec", "psutil")
EXTRAS = {
    "data": ("datasets", "huggingface_hub"),
    "plots": ("matplotlib",),
    "hf": ("transformers",),
    "s3": ("s3fs",),
    "flash": ("flash-attn-4", "quack-kernels"),
}
SETTINGS = re.compile(
    r"^(CUDA|NCCL|TORCH|PYTORCH|HF|OMP|MKL|GLOO|SLURM|WANDB|AWS)_|^(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_\w+)$"
)
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)


def lines() -> list[str]:
    """The report, a line each."""
    device = devices.pick("auto")
    rows = [("pentode", VERSION), ("python", platform.python_version()), ("system", platform.platform())]
    rows += [(name, _version(name) or "MISSING") for name in PACKAGES]
    for extra, names in EXTRAS.items():
        rows += [(name, _version(name) or f'not installed; pip install "pentode[{extra}]"') for name in names]
    rows += [
        ("C++ compiler", shutil.which("g++") or shutil.which("clang++") or "none; model.compile needs one on a CPU")
    ]
    rows += devices.facts()
    rows += [(f"kernel {name}", _attempt(test, device)) for name, test in KERNELS.items()]
    rows += [(name, _masked(name, value)) for name, value in sorted(os.environ.items()) if SETTINGS.match(name)]
    return [f"{name:<28} {log.mask(value)}" for name, value in rows]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _masked(name: str, value: str) -> str:
    return "***" if SECRET.search(name) else value


def _attention(backend: SDPBackend) -> Callable[[torch.device], None]:
    def run(device: torch.device) -> None:
        q = torch.randn(1, 2, 64, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        with sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()

    return run


def _triton(device: torch.device) -> None:
    if not devices.is_gpu(device):
        raise RuntimeError("there is no GPU, for which it builds them")
    from pentode.optim.add_kernel import add_

    add_(torch.zeros(8, device=device), torch.ones(8, device=device))


def _fused_adamw(device: torch.device) -> None:
    if not fused.usable(torch.zeros(1, device=device)):
        raise RuntimeError("this torch has none")


def _flash_4(device: torch.device) -> None:
    if not devices.is_gpu(device):
        raise RuntimeError("there is no GPU, for which it is")
    q = torch.randn(1, 64, 2, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    if not flash.PACKAGE.is_usable(device):
        raise RuntimeError("it is not installed, or not for this GPU")
    flash.flash_attention(q, q, q).sum().backward()


def _fused_products(device: torch.device) -> None:
    if not devices.is_gpu(device):
        raise RuntimeError("there is no GPU, for which they are")
    x, gate_up, down = (torch.randn(*s, device=device, dtype=torch.bfloat16) for s in ((64, 64), (128, 64), (64, 64)))
    if not fused_products.PACKAGE.is_usable(device):
        raise RuntimeError("it is not installed, or not for this GPU")
    for weight in (gate_up, down):
        put_beside(weight, torch.zeros_like(weight, dtype=torch.float32))
    operands = [t.requires_grad_() for t in (x, gate_up, down)]
    for _ in range(2):  # the second adds to the first's gradients
        swiglu_layer(*operands, onto=x).sum().backward()


KERNELS: dict[str, Callable[[torch.device], None]] = {
    "attention math": _attention(SDPBackend.MATH),
    "attention flash": _attention(SDPBackend.FLASH_ATTENTION),
    "attention efficient": _attention(SDPBackend.EFFICIENT_ATTENTION),
    "attention cudnn": _attention(SDPBackend.CUDNN_ATTENTION),
    "FlashAttention-4": _flash_4,
    "products of quack": _fused_products,
    "fused AdamW": _fused_adamw,
    "built by Triton": _triton,
}


def _attempt(test: Callable[[torch.device], None], device: torch.device) -> str:
    """Whether a kernel runs on this device; if not, the first line of the reason."""
    try:
        test(device)
    except Exception as error:  # noqa: BLE001 - whatever a kernel's library raises
        return f"no: {(str(error) or type(error).__name__).splitlines()[0]}"
    return "usable"
