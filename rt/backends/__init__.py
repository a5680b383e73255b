"""Engines behind one seam: `get("openvino").load(path, ...)`, and `choose` that picks one and says why."""

from __future__ import annotations

from collections.abc import Callable

from rt.backends.base import Array, Availability, Backend, DeviceBackend, DeviceEngine, Engine, Form, OwnGraph
from rt.backends.inductor import Inductor, InductorCpu
from rt.backends.openvino_cpu import OpenVINO
from rt.backends.ort_cpu import OnnxRuntime
from rt.backends.ort_gpu import OnnxRuntimeCuda, OnnxRuntimeTensorRT
from rt.backends.tensorrt import CLASSIC, RTX, TensorRT
from rt.config import DType
from rt.errors import BackendUnavailableError, ConfigError, nearest
from rt.processors import cpu_count

__all__ = [
    "AUTO",
    "BACKENDS",
    "ON_HOST",
    "Array",
    "Availability",
    "Backend",
    "DeviceBackend",
    "DeviceEngine",
    "Engine",
    "Form",
    "OwnGraph",
    "arithmetic",
    "choose",
    "choose_target",
    "cpu_count",
    "get",
]

AUTO = "auto"
_ALL: tuple[Backend, ...] = (
    TensorRT(CLASSIC),
    TensorRT(RTX),
    Inductor(),
    OnnxRuntimeCuda(),
    OnnxRuntimeTensorRT(),
    OpenVINO(),
    OnnxRuntime(),
    InductorCpu(),
)
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _ALL}
"""By name, the preferred first."""
ON_HOST = tuple(backend.name for backend in _ALL if not isinstance(backend, DeviceBackend))
"""Those that need no GPU."""


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
    unmentioned: list[str] = []
    for candidate in sorted(BACKENDS.values(), key=lambda backend: backend.name != preferred):
        availability = candidate.available()
        problem = availability.problem or candidate.refuses(dtype) or unfit(candidate)
        if not problem:
            why = "".join(f"; not {other}" for other in passed_over)
            return (
                candidate,
                f"{candidate.name}: computes {dtype.value} graphs in {arithmetic(candidate, dtype)}{why}",
            )
        # Most machines have no GPU, and nobody there asked for one.
        expected = candidate.name in (preferred, *ON_HOST) or bool(availability)
        (passed_over if expected else unmentioned).append(f"{candidate.name} ({problem})")
    raise BackendUnavailableError(
        f"no engine can run {dtype.value} graphs: {'; '.join([*passed_over, *unmentioned])}"
    )


def choose_target(
    name: str, dtype: DType, unfit: Callable[[Backend], str] = lambda backend: ""
) -> tuple[Backend, str]:
    """The backend to build for: as `choose`, but one asked for by name may lack its GPU, which only running needs.

    Args:
        name: A backend, or "auto".
        dtype: The format of the graphs.
        unfit: Why "auto" passes a backend over that could run them: nothing can be built for it here.

    Raises:
        BackendUnavailableError, ConfigError: As `choose`.
    """
    if name != AUTO and (backend := get(name)).available().version is not None:
        if reason := backend.refuses(dtype):
            raise ConfigError(f"{name} cannot run {dtype.value} graphs: {reason}")
        return backend, f"{name}: as asked"
    return choose(name, dtype, unfit=unfit)


def arithmetic(backend: Backend, dtype: DType) -> str:
    """In what `backend` computes graphs of `dtype`, such as "f32" or "int8 and bf16"."""
    floats = backend.arithmetic(dtype)
    return f"int8 and {floats}" if dtype is DType.INT8 else floats
