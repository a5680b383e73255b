"""Forms beyond ONNX: what a backend compiles ahead of time, from a program in torch or from its graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from rt.backends import Backend, Form
from rt.bundle import Bundle, EngineRecord
from rt.config import BuildConfig
from rt.errors import ConfigError
from rt.export.lower import WeightFile
from rt.export.program import Program


@dataclass(frozen=True, kw_only=True)
class Request:
    """What forms are written for.

    Attributes:
        stage: The folder that becomes the bundle.
        config: The build's options.
        donor: A bundle of the same model with other weights, whose refittable plans are refit rather than built.
    """

    stage: Path
    config: BuildConfig
    donor: Bundle | None = None


@dataclass(frozen=True, kw_only=True)
class Writer:
    """How a backend makes its forms.

    Attributes:
        check: Raises ConfigError before any work where this machine or backend cannot do what is asked.
        compile: A program, the module that computes it in its final precision, and the file of its component's
            weights → paths of the forms that it wrote into the stage.
        write: The same from a lowered program, when torch's weights are gone.
        fuses: Whether `compile` gets programs with pixels in half precision channels last and with the operators of
            `rt.export.operators`.
        reads_fused: Whether `write` reads such a program lowered, `Form.FUSED`.
    """

    check: Callable[[Request], None]
    compile: Callable[[Program, nn.Module, WeightFile, Request], Mapping[Form, str]] | None = None
    write: Callable[[EngineRecord, Request], Mapping[Form, str]] | None = None
    fuses: bool = False
    reads_fused: bool = False


def writer(backend: Backend) -> Writer | None:
    """Of that backend, or None where it runs ONNX.

    Raises:
        BackendUnavailableError: When a package that it needs is missing.
    """
    from rt.export.inductor import WRITERS as inductor
    from rt.export.tensorrt.forms import WRITERS as tensorrt  # it needs Triton for classic TensorRT alone

    return {**inductor, **tensorrt}.get(backend.name)


def check_options(backend: Backend, request: Request) -> None:
    """Say before any work what cannot be.

    Raises:
        ConfigError: An option is for another backend, or cannot be had on this machine.
    """
    for option, family in particular(request).items():
        if not backend.name.startswith(family):
            whose = {"tensorrt": "TensorRT"}.get(family, family)
            raise ConfigError(
                f"{option} is for {whose}, and this build is for {backend.name}; "
                f"leave it out or add --backend {family}"
            )
    if (found := writer(backend)) is not None:
        found.check(request)


def particular(request: Request) -> Mapping[str, str]:
    """What was asked for that one family of backends has, and the family: what their names begin with."""
    config = request.config
    asked = {
        ("--refittable", "tensorrt"): config.refittable,
        ("--portable", "tensorrt"): config.portable,
        ("--tune", "tensorrt"): config.tune,
        ("--refit", "tensorrt"): request.donor is not None,
        ("--max-autotune", "inductor"): config.max_autotune,
    }
    return dict(each for each, given in asked.items() if given)
