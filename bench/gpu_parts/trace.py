"""What a profiler saw of a picture: how long the GPU had nothing to do, and what happened between two steps.

The trace is the one of `torch.profiler`, which sees all kernels of the process, whoever launched them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from torch.profiler import ProfilerActivity, profile

Event = Mapping[str, Any]
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST = ("cuda_runtime", "cuda_driver")
_KINDS = {
    "attention": ("attention", "flash", "fmha", "sdpa"),
    "norm": ("norm",),
    "GEGLU": ("gelu",),
    "Triton": ("triton_",),
    "convolution": ("conv", "fprop", "implicit"),
    "product": ("gemm", "cutlass", "nvjet", "xmma", "matmul", "_mm"),
}
"""Of kernels, by what is in their names, the first that fits."""
_NAME = 90


def observe(call: Callable[[], object], file: Path) -> dict[str, float]:
    """What `summary` says of a run of `call`; the trace is left in `file`."""
    return summary(record(call, file))


def record(call: Callable[[], object], file: Path) -> list[Event]:
    """The events of a run of `call`; the trace is left in `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        call()
    profiler.export_chrome_trace(str(file))
    events: list[Event] = json.loads(file.read_text())["traceEvents"]
    return events


def kinds(events: Iterable[Event], *, longest: int) -> dict[str, dict[str, float]]:
    """What the kernels of a trace took; empty where it has no work of a GPU.

    Returns:
        us: Microseconds by kind of kernel, the most first.
        launches: How many there were of each kind.
        longest: Microseconds of the names that took the most, so many of them.
    """
    device = [event for event in events if event.get("ph") == "X" and event.get("cat") in _DEVICE]
    us, launches, names = Counter[str](), Counter[str](), Counter[str]()
    for event in device:
        kind = _kind(event["name"])
        us[kind] += event["dur"]
        launches[kind] += 1
        names[event["name"][:_NAME]] += event["dur"]
    if not device:
        return {}
    return {
        "us": dict(us.most_common()),
        "launches": dict(launches),
        "longest": dict(names.most_common(longest)),
    }


def _kind(name: str) -> str:
    """From the names that inductor, our kernels, cuDNN and cuBLAS give."""
    name = name.lower()
    return next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), "other")


def summary(events: Iterable[Event]) -> dict[str, float]:
    """Figures of a trace of one picture; empty where it has no work of a GPU.

    A step is a launch that ran several kernels, as graphs do: of these the largest kind that comes more than once.
    Where each kernel was launched by itself there are no figures of steps.

    Returns:
        kernels: Kernels, copies and fills on the device.
        span_us: From the first to the end of the last.
        idle_percent: Of that time, how much passed with none of them running.
        steps: Graphs of a step.
        step_us: Median from the begin of one to the begin of the next.
        gap_us: Median from the end of one to the begin of the next.
        gap_percent: Of a step.
        synchronisations: Calls by which the host waited for the device while the steps were launched; not there where
            the profiler did not see the launches, so that nothing is claimed.
    """
    events = [event for event in events if event.get("ph") == "X"]
    device = sorted((event for event in events if event.get("cat") in _DEVICE), key=lambda event: event["ts"])
    if not device:
        return {}
    span = max(map(_end, device)) - device[0]["ts"]
    figures = {
        "kernels": len(device),
        "span_us": span,
        "idle_percent": 100 * (1 - _covered(device) / span),
    }
    return figures | _steps(device, [event for event in events if event.get("cat") in _HOST])


def _steps(device: list[Event], host: list[Event]) -> dict[str, float]:
    launches: dict[int, list[Event]] = {}
    for event in device:
        launches.setdefault(event["args"]["correlation"], []).append(event)
    sizes = Counter(len(kernels) for kernels in launches.values())
    size = max((size for size, count in sizes.items() if count > 1), default=1)
    if size == 1:
        return {}
    steps = {key: kernels for key, kernels in launches.items() if len(kernels) == size}
    begins = [kernels[0]["ts"] for kernels in steps.values()]
    ends = [max(map(_end, kernels)) for kernels in steps.values()]
    step = median(after - before for before, after in pairwise(begins))
    gap = median(after - before for before, after in zip(ends[:-1], begins[1:], strict=True))
    figures = {"steps": len(steps), "step_us": step, "gap_us": gap, "gap_percent": 100 * gap / step}
    launched = sorted(event["ts"] for event in host if event["args"].get("correlation") in steps)
    if launched:
        figures["synchronisations"] = sum(
            "Synchronize" in event["name"] and launched[0] < event["ts"] < launched[-1] for event in host
        )
    return figures


def _end(event: Event) -> float:
    end: float = event["ts"] + event["dur"]
    return end


def _covered(ordered: list[Event]) -> float:
    """The time in which at least one of them was running."""
    covered, until = 0.0, float("-inf")
    for event in ordered:
        covered += max(_end(event) - max(event["ts"], until), 0.0)
        until = max(until, _end(event))
    return covered
