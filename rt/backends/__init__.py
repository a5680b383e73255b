"""Engines behind one seam: `get("openvino").load(path, ...)`, and `choose` that picks one and says why."""

from __future__ import annotations

import os
from collections.abc import Callable

from rt.backends.base import Array, Availability, Backend, DeviceBackend, DeviceEngine, Engine, Form
from rt.backends.openvino_cpu import OpenVINO
from rt.backends.ort_cpu import OnnxRuntime
from rt.config import DType
from rt.errors import BackendUnavailableError, ConfigError, nearest

__all__ = [
    "AUTO",
    "BACKENDS",
    "Array",
    "Availability",
    "Backend",
    "DeviceBackend",
    "DeviceEngine",
    "Engine",
    "Form",
    "choose",
    "cpu_count",
    "get",
]

AUTO = "auto"
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (OpenVINO(), OnnxRuntime())}
"""By name, the preferred first."""


def get(name: str) -> Backend:
    """The backend of that name, installed or not.

    Raises:
        ConfigError: When there is none, with those there are.
    """
    if name not in BACKENDS:
        valid = ", ".join([AUTO, *BACKENDS])
        raise ConfigError(f"backend {name!r} does not exist{nearest(name, BACKENDS)}; use one of {valid}")
    return BACKENDS[name]


def choose(
    name: str, dtype: DType, preferred: str = "", unfit: Callable[[Backend], str] = lambda backend: ""
) -> tuple[Backend, str]:
    """The backend to run graphs of `dtype` with, and one line that says why it is this one.

    Args:
        name: A backend, which is then the only candidate, or "auto".
        dtype: The format of the graphs.
        preferred: What the bundle was verified with; "auto" tries it first.
        unfit: Why the bundle at hand has nothing for a backend, or "" where it has.

    Raises:
        BackendUnavailableError: When no candidate is installed, with the command that installs one.
        ConfigError: When the name is unknown, or that backend cannot run `dtype` or this bundle.
    """
    if name != AUTO:
        backend = get(name)
        if problem := backend.available().problem:
            raise BackendUnavailableError(f"{name}: {problem}")
        if reason := backend.refuses(dtype):
            raise ConfigError(f"{name} cannot run {dtype.value} graphs: {reason}")
        if reason := unfit(backend):
            raise ConfigError(f"{name} cannot run this bundle: {reason}")
        return backend, f"{name}: as asked"
    passed_over: list[str] = []
    for candidate in sorted(BACKENDS.values(), key=lambda backend: backend.name != preferred):
        problem = candidate.available().problem or candidate.refuses(dtype) or unfit(candidate)
        if not problem:
            why = "".join(f"; not {other}" for other in passed_over)
            return (
                candidate,
                f"{candidate.name}: computes {dtype.value} graphs in {_arithmetic(candidate, dtype)}{why}",
            )
        passed_over.append(f"{candidate.name} ({problem})")
    raise BackendUnavailableError(f"no engine can run {dtype.value} graphs: {'; '.join(passed_over)}")


def _arithmetic(backend: Backend, dtype: DType) -> str:
    floats = backend.arithmetic(dtype)
    return f"int8 and {floats}" if dtype is DType.INT8 else floats


def cpu_count() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
