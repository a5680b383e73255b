"""The plans of a build: which graph each flavour takes, and with which options."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from rt.backends import Form
from rt.backends.tensorrt import CLASSIC, RTX, Flavour
from rt.bundle import Bundle, EngineRecord
from rt.config import BuildConfig
from rt.cuda.driver import CudaDevice
from rt.errors import ConfigError
from rt.export.forms import Request, Writer
from rt.export.tensorrt.graph import with_plugins
from rt.export.tensorrt.plan import Options, build_plan, check_machine, timing_cache_file
from rt.export.tensorrt.refit import refit_plan
from rt.export.tensorrt.tune import Choice, choose_plugins

logger = logging.getLogger(__name__)


def _check(flavour: Flavour, request: Request) -> None:
    """Raises ConfigError."""
    if request.config.tune and flavour is RTX:
        raise ConfigError(
            f"--tune compares our plugins with native operators, and {RTX.name} takes no plugins; leave it out"
        )
    check_machine(flavour, _options(request.config))
    if request.donor is not None:
        _check_donor(flavour, request.config, request.donor)


def _check_donor(flavour: Flavour, config: BuildConfig, donor: Bundle) -> None:
    other = donor.manifest.config
    if not other.refittable or other.backend != flavour.name:
        raise ConfigError(
            f"{donor.path} has no refittable plans for {flavour.name}; "
            f"build it with --backend {flavour.name} --refittable"
        )
    if replace(other, refittable=config.refittable) != config:
        raise ConfigError(
            f"{donor.path} was built with other options; a refit keeps --height, --width, --batch-size, --dtype, "
            f"--step-cache, --portable and --tune"
        )


def _rtx(record: EngineRecord, request: Request) -> Mapping[Form, str]:
    """A plan of the plain graph: RTX has no plugins that carry their kernels."""
    return _write(RTX, record, request.stage / record.forms[Form.ONNX], request, _options(request.config))


def _classic(record: EngineRecord, request: Request) -> Mapping[Form, str]:
    """A plan of the fused graph, where there is one, its operators `rt::…` our plugins where these are faster."""
    gpu, capability = _gpu()
    options = _options(request.config, timing_cache_file(CLASSIC, gpu))
    if Form.FUSED not in record.forms:
        return _write(CLASSIC, record, request.stage / record.forms[Form.ONNX], request, options)
    from rt.export.tensorrt.plugins import register  # needs Triton

    register(80 if request.config.portable else capability)
    fused = request.stage / record.forms[Form.FUSED]
    choices = choose_plugins(fused, options) if request.config.tune else []
    for choice in choices:
        logger.info("%s: %s", record.name, choice)
    with with_plugins(fused, native=Choice.native(choices)) as graph:
        return _write(CLASSIC, record, graph, request, options)


def _write(
    flavour: Flavour, record: EngineRecord, graph: Path, request: Request, options: Options
) -> Mapping[Form, str]:
    path = f"engines/{record.name}.{flavour.form.value}"
    if request.donor is None:
        build_plan(flavour, graph, request.stage / path, options)
    else:
        refit_plan(flavour, request.donor.path / path, graph, request.stage / path)
    return {flavour.form: path}


def _options(config: BuildConfig, timing_cache: Path | None = None) -> Options:
    return Options(refittable=config.refittable, portable=config.portable, timing_cache=timing_cache)


def _gpu() -> tuple[str, int]:
    """Name and compute capability."""
    device = CudaDevice()
    found = device.name, int(device.capability)
    device.close()
    return found


WRITERS: Mapping[str, Writer] = {
    CLASSIC.name: Writer(check=partial(_check, CLASSIC), write=_classic, reads_fused=True),
    RTX.name: Writer(check=partial(_check, RTX), write=_rtx),
}
"""By the name of the backend."""
