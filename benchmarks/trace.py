"""Where a step's time goes on a GPU, read off a trace of torch.profiler."""

import json
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Span = tuple[float, float]  # microseconds
KINDS = ("matmul", "attention", "elementwise", "loss", "optimizer", "communication")
MATMUL = ("gemm", "nvjet", "cutlass", "cublas", "_scaled_mm", "splitk")
ATTENTION = ("flash", "fmha", "cudnn_generated", "sdpa", "attention")


def traced(step: Callable[[], object], *, steps: int) -> list[dict[str, Any]]:
    """The GPU's events of that many steps: kernels, copies, and the ranges of `record_function`."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(os.environ.get("TRACE_FILE") or Path(folder) / "trace.json")
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [
        event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation")
    ]


def breakdown(events: list[dict[str, Any]], *, steps: int) -> tuple[dict[str, float], list[tuple[str, float, int]]]:
    """Milliseconds a step by kind, "exposed" and "idle" among them; and the kernels that took most, with their counts.

    A kernel counts by the range it lies in ("loss", "optimizer"), else by its name. Communication that no other kernel
    runs beside is "exposed"; time in which nothing runs is "idle".
    """
    ranges: dict[str, list[Span]] = defaultdict(list)
    for event in events:
        if event["cat"] == "gpu_user_annotation" and event["name"] in KINDS:
            ranges[event["name"]].append((event["ts"], event["ts"] + event["dur"]))
    by_kind: dict[str, list[Span]] = defaultdict(list)
    by_name: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in events:
        if event["cat"] != "gpu_user_annotation":
            span = event["ts"], event["ts"] + event["dur"]
            kind = _kind(event["name"], span, ranges)
            by_kind[kind].append(span)
            by_name[f"{kind}: {event['name'][:70]}"] += event["dur"]
            counts[f"{kind}: {event['name'][:70]}"] += 1
    scale = 1e-3 / steps
    work = union(span for kind, spans in by_kind.items() if kind != "communication" for span in spans)
    moving = union(by_kind.get("communication", []))
    busy = union([*work, *moving])
    found = {kind: length(union(by_kind.get(kind, []))) * scale for kind in KINDS}
    found["exposed"] = (length(moving) - shared(moving, work)) * scale
    found["idle"] = (busy[-1][1] - busy[0][0] - length(busy)) * scale if busy else 0.0
    return found, [(name, time * scale, counts[name] // steps) for name, time in by_name.most_common(40)]


def _kind(name: str, span: Span, ranges: dict[str, list[Span]]) -> str:
    low = name.lower()
    if low.startswith("nccl") or "ptop" in low:  # also copies between GPUs
        return "communication"
    for kind, spans in ranges.items():
        if any(begin <= span[0] < end for begin, end in spans):
            return kind
    if any(word in low for word in ATTENTION):
        return "attention"
    return "matmul" if any(word in low for word in MATMUL) else "elementwise"


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time, as spans that do not touch, in order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def length(spans: Iterable[Span]) -> float:
    """How long spans that do not touch are together."""
    return sum(end - begin for begin, end in spans)


def shared(some: list[Span], others: list[Span]) -> float:
    """How long both last at the same time; each list is a `union`."""
    total, i, j = 0.0, 0, 0
    while i < len(some) and j < len(others):
        total += max(0.0, min(some[i][1], others[j][1]) - max(some[i][0], others[j][0]))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return total
