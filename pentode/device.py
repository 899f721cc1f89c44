"""Which device computes, and what can be asked of it: the only file that says "cuda"."""

import os
import resource
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise

import psutil
import torch

from pentode.errors import ConfigError

FLOAT8_CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0)}  # a CPU multiplies so too, slowly
NAMES = ("auto", "cpu", "cuda")
_WITHOUT_KERNELS = ContextVar("without_kernels", default=False)


@dataclass(frozen=True)
class Memory:
    """Bytes in use now, and at most since the last `reset_peak_memory`.

    On a GPU: what torch's allocator holds. On a CPU: the process's resident memory, which cannot be reset.
    """

    allocated: int
    peak_allocated: int
    peak_reserved: int


def problems(name: str, *, local_rank: int = 0, float8: str | None = None) -> list[str]:
    """What keeps a process from the device that the config names, or that from products in float8 of this recipe."""
    if name not in NAMES:
        return [f"general.device: {name!r} is not one of {', '.join(NAMES)}"]
    found, count = torch.cuda.is_available(), torch.cuda.device_count()
    if name == "cuda" and not found:
        return ["general.device: cuda, but torch finds no GPU here; use device cpu, or auto"]
    if name != "cpu" and found and local_rank >= count:
        return [f"launch: local rank {local_rank} needs a GPU of its own, but this host has {count}"]
    if name != "cpu" and found and float8 is not None:
        needs, has = FLOAT8_CAPABILITY[float8], torch.cuda.get_device_capability(local_rank)
        if has < needs:
            return [f"model.float8: {float8} needs compute capability {needs}, this GPU has {has}; leave float8 out"]
    elif float8 == "rowwise" and not _scales_rows():
        return [f"model.float8: rowwise on a CPU needs a newer torch than {torch.__version__}; use tensorwise"]
    return []


def _scales_rows() -> bool:
    """Whether this torch multiplies numbers of 8 bits on a CPU that have a scale for each row; 2.11 has one for all."""
    x, scale = torch.zeros(16, 16, dtype=torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(x, x.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def pick(name: str, *, local_rank: int = 0) -> torch.device:
    """The device that the config names: "auto" is a GPU where there is one."""
    found = problems(name, local_rank=local_rank)
    if found:
        raise ConfigError(found)
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    _grow_in_place()
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _grow_in_place() -> None:
    """Let torch's allocator grow its segments, so that less is lost between them, unless the user has set it up."""
    if not any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        setter = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # the public name is not there yet
        (setter or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def is_gpu(device: torch.device) -> bool:
    """Whether work on this device runs beside the host."""
    return device.type == "cuda"


def has_kernels(x: torch.Tensor) -> bool:
    """Whether there are kernels for what is done with this tensor: on a GPU, but not for float64, `without_kernels`."""
    if not is_gpu(x.device) or x.dtype == torch.float64:
        return False
    return torch.compiler.is_compiling() or not _WITHOUT_KERNELS.get()


def runs_kernels(x: torch.Tensor) -> bool:
    """Whether an operator on this tensor is a kernel of ours: it has one, and torch.compile does not trace it."""
    return has_kernels(x) and not torch.compiler.is_compiling()


@contextmanager
def without_kernels() -> Iterator[None]:
    """Have operators be torch's own, in this thread."""
    before = _WITHOUT_KERNELS.set(True)
    try:
        yield
    finally:
        _WITHOUT_KERNELS.reset(before)


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


class Moment:
    """When a device has done what it was given so far; a CPU has at once."""

    def __init__(self, device: torch.device) -> None:
        self._reached = torch.Event(device, enable_timing=True) if is_gpu(device) else time.perf_counter()
        if isinstance(self._reached, torch.Event):
            self._reached.record()

    def wait(self) -> None:
        """Return when the device has come so far."""
        if isinstance(self._reached, torch.Event):
            self._reached.synchronize()

    def seconds_since(self, earlier: "Moment") -> float:
        """The time between two moments of one device, both of which must have been waited for."""
        here, there = self._reached, earlier._reached
        if isinstance(here, torch.Event) and isinstance(there, torch.Event):
            return there.elapsed_time(here) / 1000
        assert isinstance(here, float), "moments of two devices"
        assert isinstance(there, float), "moments of two devices"
        return here - there


class Fetched:
    """Numbers on their way from a device to the host."""

    def __init__(self, numbers: torch.Tensor, arrived: Moment) -> None:
        self._numbers, self.arrived = numbers, arrived

    def wait(self) -> list[float]:
        """The numbers, when they are there."""
        self.arrived.wait()
        return self._numbers.tolist()


def fetch(numbers: torch.Tensor) -> Fetched:
    """Begin to bring a few numbers to the host, as they are when the device has done what it was given so far."""
    return Fetched(numbers.to("cpu", non_blocking=True), Moment(numbers.device))


class Lane:
    """A queue of copies to the host, beside the device's other work; on a CPU each copy is done when it was asked for.

    Marks say when: one is reached when what was asked for before it is done; None, a CPU's, always is.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = new_stream(device) if is_gpu(device) else None

    def after(self, moment: torch.Event | None) -> None:
        """Do what is asked for from here on only after that moment."""
        if self._stream is not None and moment is not None:
            self._stream.wait_event(moment)

    def copy(self, source: torch.Tensor, *, into: torch.Tensor) -> None:
        """Begin to copy a tensor to the host."""
        if self._stream is None:
            into.copy_(source)
            return
        with self._stream:
            into.copy_(source, non_blocking=True)

    def mark(self) -> torch.Event | None:
        """This moment in the queue of copies."""
        return None if self._stream is None else self._stream.record_event()


def mark(device: torch.device) -> torch.Event | None:
    """This moment in the work that the device is given."""
    return current_stream(device).record_event() if is_gpu(device) else None


def go_on_after(moment: torch.Event | None, device: torch.device) -> None:
    """Have the device do what it is given from here on only after that moment; the host does not wait."""
    if moment is not None:
        current_stream(device).wait_event(moment)


def wait_until(moment: torch.Event | None) -> None:
    """Return when the device has reached that moment."""
    if moment is not None:
        moment.synchronize()


def use(device: torch.device) -> None:
    """Let the calling thread's work go to that device: each thread has one of its own."""
    if is_gpu(device):
        torch.cuda.set_device(device)


def host_bytes(count: int, device: torch.device, *, pinned: bool = True) -> torch.Tensor:
    """Memory of the host [count] uint8; `pinned`, a GPU copies there beside its other work, and at full speed."""
    return torch.empty(count, dtype=torch.uint8, pin_memory=pinned and is_gpu(device))


def room_beside(peak: int, device: torch.device) -> int:
    """Bytes of a GPU that nobody needs, if this process needs `peak` of them at most; 0 for a CPU."""
    if not is_gpu(device):
        return 0
    return free_memory(device) + torch.cuda.memory_reserved(device) - peak


class Watch:
    """Times a GPU's work between moments of its queue."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.Event] = []

    def __len__(self) -> int:
        """Marks made so far."""
        return len(self._marks)

    def mark(self) -> None:
        """Note the moment at which the GPU has done what it was given so far."""
        moment = torch.Event(self._device, enable_timing=True)
        moment.record()
        self._marks.append(moment)

    def fastest(self) -> float:
        """The shortest time between two neighbouring marks, in milliseconds; waits for the last one."""
        self._marks[-1].synchronize()
        return min(begin.elapsed_time(end) for begin, end in pairwise(self._marks))


class Graph:
    """Work that a GPU was given once, and does again at a word: on the same memory, with whatever that holds then."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def recording(self) -> AbstractContextManager[None]:
        """What is given to the GPU by the block within is recorded, not done; other threads may go on meanwhile."""
        return torch.cuda.graph(self._graph, capture_error_mode="thread_local")

    def replay(self) -> None:
        """Begin to do it all again."""
        self._graph.replay()


def generation(device: torch.device) -> int:
    """The GPU's, as its maker counts them: the first number of its compute capability."""
    return torch.cuda.get_device_capability(device)[0]


def multiprocessors(device: torch.device) -> int:
    """How many of them a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def total_memory(device: torch.device) -> int:
    """Bytes that a GPU has."""
    return torch.cuda.get_device_properties(device).total_memory


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that no process holds."""
    return torch.cuda.mem_get_info(device)[0]


def memory(device: torch.device) -> Memory:
    """What is in use on the device, in bytes."""
    if is_gpu(device):
        found = torch.cuda.memory_stats_as_nested_dict(device)  # the flat form, which others read, takes 0.4 ms
        allocated, reserved = (found[f"{kind}_bytes"]["all"] for kind in ("allocated", "reserved"))
        return Memory(allocated["current"], allocated["peak"], reserved["peak"])
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
