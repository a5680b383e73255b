"""Which backend a build is for: the one that is asked for, or the first that this machine can build for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from rt.backends import Backend, DeviceBackend, choose_target
from rt.errors import RtError
from rt.export.forms import Request, check_options, writer
from rt.kernel_image import KernelImage

logger = logging.getLogger(__name__)


def target(request: Request, failed: Mapping[str, str]) -> Backend:
    """The backend that is asked for, or of those that have not `failed` the first that this machine can build for.

    Raises:
        ConfigError, BackendUnavailableError: It cannot, or an option is for another one.
    """
    passed_over = []

    def unfit(backend: Backend) -> str:
        reason = failed.get(backend.name) or refusal(backend, request)
        if reason:
            passed_over.append(reason)
        return reason

    backend, why = choose_target(request.config.backend, request.config.dtype, unfit)
    logger.log(logging.WARNING if passed_over else logging.INFO, "%s", why)
    check_options(backend, request)
    loop_compiler(backend)
    return backend


def refusal(backend: Backend, request: Request) -> str:
    """Why nothing can be built for `backend` here, or "" when it can: a compiler, a header, a package is missing."""
    try:
        if (found := writer(backend)) is not None:
            found.check(request)
        loop_compiler(backend)
    except RtError as error:
        return str(error)
    return ""


def loop_compiler(backend: Backend) -> Callable[[Path], tuple[KernelImage, ...]]:
    """Writes the kernels that a loop on `backend` launches; on the host there are none.

    Raises:
        BackendUnavailableError: It needs Triton, which is not installed.
        ConfigError: The GPU is too old for them.
    """
    if not isinstance(backend, DeviceBackend):
        return lambda stage: ()
    from rt.export.loop_kernels import check_gpu, compile_loop

    check_gpu()
    return compile_loop
