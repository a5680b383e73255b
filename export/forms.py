"""Forms beyond ONNX: a backend that compiles ahead of time writes its own when the graphs of a component are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rt.backends import Backend, Form
from rt.bundle import Bundle, EngineRecord
from rt.config import BuildConfig
from rt.errors import ConfigError


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
        write: A lowered program → paths of the forms that it wrote into the stage.
        fused: Whether it reads `Form.FUSED`, which is then lowered in every half precision.
    """

    check: Callable[[Request], None]
    write: Callable[[EngineRecord, Request], Mapping[Form, str]]
    fused: bool = False


def writer(backend: Backend) -> Writer | None:
    """Of that backend, or None where it runs ONNX.

    Raises:
        BackendUnavailableError: When a package that it needs is missing.
    """
    from rt.export.tensorrt.forms import WRITERS  # it needs Triton for classic TensorRT alone

    return WRITERS.get(backend.name)


def check_options(backend: Backend, request: Request) -> None:
    """Say before any work what cannot be.

    Raises:
        ConfigError: An option is for another backend, or cannot be had on this machine.
    """
    found = writer(backend)
    if found is not None:
        found.check(request)
        return
    config = request.config
    asked = {"--refittable": config.refittable, "--portable": config.portable, "--tune": config.tune}
    asked["--refit"] = request.donor is not None
    for option, given in asked.items():
        if given:
            raise ConfigError(
                f"{option} is for TensorRT, and this build is for {backend.name}; "
                f"leave it out or add --backend tensorrt"
            )
