"""Whether an engine still gives the numbers that torch gave at the build."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from rt.backends import Array, Backend, Engine, cpu_count
from rt.bundle import Bundle, EngineRecord
from rt.config import DType
from rt.errors import AccuracyError, IntegrityError, NumericsError

# Relative L2 distance from torch in fp32 that tells a wrong graph from rounding. Measured on real and random weights:
# 1e-6 for fp32, 4e-3 for fp16, 1.5e-2 for bf16, 6.2e-2 for int8; a graph with one wrong op is off by 0.1 or more.
TOLERANCE = {DType.FP32: 1e-4, DType.FP16: 2e-2, DType.BF16: 5e-2, DType.INT8: 1e-1, DType.FP8: 1e-1}


def save_reference(
    path: Path, inputs: Mapping[str, Array], outputs: Mapping[str, NDArray[np.float32]]
) -> None:
    """Keep the inputs of a program and torch's outputs beside the engine."""
    arrays = {f"input.{name}": value for name, value in inputs.items()}
    arrays |= {f"output.{name}": value for name, value in outputs.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for its own option


def compare(engine: Engine, reference: Path, *, name: str, dtype: DType) -> dict[str, float]:
    """Relative L2 distance of each output of `engine` from the reference.

    Raises:
        NumericsError: When an output is not finite.
        AccuracyError: When one is farther off than `TOLERANCE`.
        IntegrityError: When the reference is not of this engine.
    """
    arrays = _read_reference(reference, engine)
    for buffer in engine.outputs.values():
        buffer.fill(np.nan)  # an output that the engine leaves alone must not pass
    for key, value in arrays.items():
        if key.startswith("input."):
            np.copyto(engine.inputs[key.removeprefix("input.")], value)
    engine.enqueue()
    errors = {}
    for output, got in engine.outputs.items():
        expected = arrays[f"output.{output}"]
        if not np.isfinite(got).all():
            raise NumericsError(
                f"{name}: output {output!r} has NaN or Inf in {dtype.value}; build with --dtype fp32"
            )
        scale = max(float(np.linalg.norm(expected)), 1e-30)  # all zeros must not divide by zero
        # Three digits: more would differ from run to run, and two builds of one source would not be equal.
        errors[output] = float(f"{np.linalg.norm(got - expected) / scale:.3g}")
        if not errors[output] <= TOLERANCE[dtype]:
            raise AccuracyError(
                f"{name}: output {output!r} is {errors[output]:.1e} away from torch (relative L2), "
                f"more than {TOLERANCE[dtype]:.0e} for {dtype.value}; build with --dtype fp32 or another --backend"
            )
    return errors


def _read_reference(path: Path, engine: Engine) -> dict[str, Array]:
    shapes = {f"input.{name}": array.shape for name, array in engine.inputs.items()}
    shapes |= {f"output.{name}": array.shape for name, array in engine.outputs.items()}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in shapes}
    except (
        OSError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        BadZipFile,
    ):  # an array alone is no archive
        arrays = {}
    if {name: array.shape for name, array in arrays.items()} != shapes:
        raise IntegrityError(
            f"{path} does not hold inputs and outputs of its engine; build or copy the bundle again"
        )
    return arrays


def check(record: EngineRecord, folder: Path, backend: Backend) -> dict[str, float]:
    """Run every form of an engine in `folder` that `backend` can run; gives the errors of the one that it prefers.

    Raises:
        NumericsError, AccuracyError: As `compare`.
    """
    errors = {}
    for path in reversed(record.runnable(backend)):
        engine = backend.load(
            folder / path, record.inputs, record.outputs, dtype=record.dtype, threads=cpu_count()
        )
        errors = compare(engine, folder / record.reference, name=record.name, dtype=record.dtype)
        del engine  # before the next one takes its own memory
    return errors


def verify(bundle: Bundle, backend: Backend) -> Iterator[tuple[EngineRecord, dict[str, float]]]:
    """Hash every file, then run every engine against its reference; yields each engine with its errors.

    Raises:
        IntegrityError, NumericsError, AccuracyError: With the file or the engine that is wrong.
    """
    bundle.verify()
    for record in bundle.manifest.engines:
        yield record, check(record, bundle.path, backend)
