"""Which device computes, and what can be asked of it: the only file that says "cuda"."""

import resource
from dataclasses import dataclass

import psutil
import torch

from pentode.errors import ConfigError

NAMES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Memory:
    """Bytes in use now, and at most since the last `reset_peak_memory`.

    On a GPU: what torch's allocator holds. On a CPU: the process's resident memory, which cannot be reset.
    """

    allocated: int
    peak_allocated: int
    peak_reserved: int


def problems(name: str, *, local_rank: int = 0) -> list[str]:
    """What keeps a process from the device that the config names."""
    if name not in NAMES:
        return [f"general.device: {name!r} is not one of {', '.join(NAMES)}"]
    found, count = torch.cuda.is_available(), torch.cuda.device_count()
    if name == "cuda" and not found:
        return ["general.device: cuda, but torch finds no GPU here; use device cpu, or auto"]
    if name != "cpu" and found and local_rank >= count:
        return [f"launch: local rank {local_rank} needs a GPU of its own, but this host has {count}"]
    return []


def pick(name: str, *, local_rank: int = 0) -> torch.device:
    """The device that the config names: "auto" is a GPU where there is one."""
    found = problems(name, local_rank=local_rank)
    if found:
        raise ConfigError(found)
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def is_gpu(device: torch.device) -> bool:
    """Whether work on this device runs beside the host."""
    return device.type == "cuda"


def backend(device: torch.device) -> str:
    """The communication backend that serves this device."""
    return "nccl" if is_gpu(device) else "gloo"


def name(device: torch.device) -> str:
    """The device's product name, or "cpu"."""
    return torch.cuda.get_device_name(device) if is_gpu(device) else "cpu"


def small_messages(device: torch.device, *, blocks: int) -> object | None:
    """Options of a process group whose messages take no more thread blocks of a GPU than this; None for a CPU's."""
    if not is_gpu(device):
        return None
    options = torch.distributed.ProcessGroupNCCL.Options()
    options.config.max_ctas = blocks
    return options


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if is_gpu(device):
        torch.cuda.synchronize(device)


def new_stream(device: torch.device) -> torch.Stream:
    """A queue of work beside the current one."""
    return torch.Stream(device)


def current_stream(device: torch.device) -> torch.Stream:
    """The queue that work on this device goes to."""
    return torch.accelerator.current_stream(device)


def reads(device: torch.device, index: int) -> bool:
    """Whether the device can read the memory of the GPU of that number on this host."""
    return torch.cuda.can_device_access_peer(device, index)


def memory(device: torch.device) -> Memory:
    """What is in use on the device, in bytes."""
    if is_gpu(device):
        return Memory(
            torch.cuda.memory_allocated(device),
            torch.cuda.max_memory_allocated(device),
            torch.cuda.max_memory_reserved(device),
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the kernel counts in KiB
    return Memory(psutil.Process().memory_info().rss, peak, peak)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak from here."""
    if is_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)


def be_deterministic() -> None:
    """Refuse kernels whose result depends on timing, so that a resumed run repeats the uninterrupted one."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs a pass over every new tensor
    torch.backends.cudnn.benchmark = False


def facts() -> list[tuple[str, str]]:
    """What `pentode doctor` prints about devices."""
    rows = [("cpu threads", str(torch.get_num_threads()))]
    if not torch.cuda.is_available():
        return [*rows, ("GPU", "none that torch can use")]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        rows.append((f"GPU {i}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    rows.append(("CUDA", f"{torch.version.cuda}, bfloat16 {torch.cuda.is_bf16_supported()}"))
    return rows
