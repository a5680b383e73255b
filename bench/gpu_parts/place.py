"""Where a part computes and how it is timed: the GPU, with events and graphs, or the CPU in a dry run."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from rt.bench.gpu_parts.part import Context
from rt.bench.gpu_parts.record import DRY, Gpu
from rt.bench.timing import Samples, interleave
from rt.errors import BackendUnavailableError

Call = Callable[[], Any]
_TURN_S = 0.03


@dataclass(frozen=True)
class Place:
    """A device of torch. Times are of the device where that is a GPU: between two events, in one stream."""

    device: torch.device

    @property
    def dry(self) -> bool:
        """Whether it is the CPU."""
        return self.device.type == "cpu"

    def generator(self, seed: int) -> torch.Generator:
        """Of numbers made there."""
        return torch.Generator(self.device).manual_seed(seed)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if not self.dry:
            torch.cuda.synchronize()

    def elapsed(self, call: Call, count: int = 1) -> float:
        """Seconds a call, of `count` one after the other."""
        if self.dry:
            started = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - started) / count
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count

    def walled(self, call: Call) -> float:
        """Seconds by the clock of the host until the device is idle again."""
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started

    def graph(self, call: Call) -> Call:
        """What replays `call` as a CUDA graph; on the CPU `call` itself. Its inputs keep their addresses."""
        if self.dry:
            return call
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose algorithms and allocate in their first calls
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def compare(self, calls: Mapping[str, Call], rounds: int) -> dict[str, Samples]:
        """All in turn, after one call of each that does not count; a turn repeats what is shorter than 30 ms."""
        rounds = 1 if self.dry else rounds
        counts = dict.fromkeys(calls, 1)
        if not self.dry:
            for name, call in calls.items():
                self.elapsed(call)
                counts[name] = max(1, math.ceil(_TURN_S / max(self.elapsed(call), 1e-7)))
        timed = {name: partial(self.elapsed, call, counts[name]) for name, call in calls.items()}
        return interleave(timed, rounds)

    def used_gib(self) -> float:
        """Of the whole device now, whoever holds it, but for what torch could give back at once; 0 on the CPU."""
        if self.dry:
            return 0.0
        self.wait()
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30

    def facts(self) -> Gpu:
        """What the device is."""
        if self.dry:
            return DRY
        properties = torch.cuda.get_device_properties(self.device)
        return Gpu(
            name=properties.name,
            capability=10 * properties.major + properties.minor,
            memory_gib=round(properties.total_memory / 2**30, 1),
            multiprocessors=properties.multi_processor_count,
            l2_mib=properties.L2_cache_size / 2**20,
            versions={
                "driver's CUDA": _driver(),
                "torch's CUDA": str(torch.version.cuda),
                **{name: found for name in ("torch", "triton", "diffusers") if (found := _version(name))},
            },
        )


def find(context: Context) -> Place:
    """The GPU, or the CPU in a dry run.

    Raises:
        BackendUnavailableError: There is no GPU.
    """
    if context.dry:
        torch.set_num_threads(1)  # what there is to do is too little to share
        return Place(torch.device("cpu"))
    gc.collect()  # of what ran in this process before
    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            "torch sees no GPU; go to a machine with one, or see that all runs with --dry"
        )
    torch.cuda.empty_cache()
    return Place(torch.device("cuda"))


@contextmanager
def trying_convolutions(wanted: bool = True) -> Iterator[None]:
    """Whether cuDNN tries out its ways of computing a convolution when it first meets it, or takes what it deems best.

    The setting is the process's, so it is made around what it is meant for and taken back.
    https://docs.pytorch.org/docs/stable/backends.html#torch.backends.cudnn.torch.backends.cudnn.benchmark
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def facts(context: Context) -> Gpu:
    """See `Place.facts`."""
    return find(context).facts()


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over that of the reference, both in float64; NaN where the value has one."""
    value, reference = value.double(), reference.to(value.device).double()
    return float((value - reference).norm() / reference.norm())


def _driver() -> str:
    """The newest CUDA that the driver runs, such as 12.8."""
    bindings: Any = torch._C  # its stubs leave this out
    version: int = bindings._cuda_getDriverVersion()
    return f"{version // 1000}.{version % 1000 // 10}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
