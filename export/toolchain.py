"""What compiling C++ for a processor or a GPU takes of this machine: compiler, binutils, CUDA's headers, the driver.

A CUDA toolkit brings headers and a library to link with. Without one, torch's own packages bring some of the headers,
two more packages the rest, and the driver itself is what is linked with.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rt.cuda.probe import DRIVER
from rt.errors import BackendUnavailableError

HEADERS = {
    "cuda_runtime_api.h": "nvidia-cuda-runtime",
    "crt/host_defines.h": "nvidia-cuda-crt",
    "nv/target": "nvidia-cuda-cccl",
}
"""What torch's headers include of CUDA's, each for all of its package, and the package."""
STUBS = "lib64/stubs"
TOOLKIT = Path("/usr/local/cuda")
"""Where a toolkit is by default."""


def check_compiler() -> None:
    """Raises BackendUnavailableError without g++ and binutils."""
    # When it is imported, torch writes down there which folder it takes by default, as if a user had.
    with environment(
        TORCHINDUCTOR_CACHE_DIR=os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
    ):
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError) as error:
            raise BackendUnavailableError(
                "inductor compiles C++, and there is no compiler; install g++ 10 or later, or set CXX to one"
            ) from error
    if shutil.which("strip") is None:
        raise BackendUnavailableError(
            "a package of inductor is cleaned with strip, and there is none; install binutils"
        )


def cuda_home() -> Path:
    """The folder of CUDA whose `include` has every header: a toolkit, or what packages bring.

    Raises:
        BackendUnavailableError: There is none, with what is missing and how to get it.
    """
    from torch.utils import cpp_extension

    packages = sorted((Path(str(torch.__file__)).parents[1] / "nvidia").glob("cu[0-9]*"))
    toolkit = cpp_extension.CUDA_HOME  # by the variable, or where nvcc is, which may be a link
    homes = [*([Path(toolkit)] if toolkit else []), *packages, TOOLKIT]
    lacking = {home: [name for name in HEADERS if not (home / "include" / name).is_file()] for home in homes}
    complete = [home for home, names in lacking.items() if not names]
    if complete:
        return complete[0]
    missing = min(lacking.values(), key=len)
    cuda = torch.version.cuda or "13.0"
    wheels = " ".join(f'"{HEADERS[name]}=={cuda}.*"' for name in missing)  # one's headers include another's
    install = (
        f"run: pip install {wheels}, or " if int(cuda.partition(".")[0]) >= 13 else ""
    )  # first with these names
    raise BackendUnavailableError(
        f"inductor compiles C++ with CUDA's headers, and there is no {', '.join(missing)}; "
        f"{install}install the CUDA toolkit {cuda} and set CUDA_HOME to it"
    )


def driver_library(name: str = DRIVER) -> Path | None:
    """The file of the driver that this process would load, wherever the loader finds it."""
    try:
        start = ctypes.CDLL(name).cuInit
        found = _Found()
        ctypes.CDLL(None).dladdr(ctypes.cast(start, ctypes.c_void_p), ctypes.byref(found))
    except (OSError, AttributeError):
        return None
    return Path(os.fsdecode(found.file)).absolute() if found.file else None


class _Found(ctypes.Structure):
    """`Dl_info`, https://man7.org/linux/man-pages/man3/dladdr.3.html."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """With these variables, which are as before afterwards."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def cuda() -> Iterator[None]:
    """While this lasts, torch compiles with the headers of `cuda_home`, and `-lcuda` is found.

    Torch reads CUDA_HOME once, and does not know its own packages. The linker wants a `libcuda.so`, by which only a
    toolkit calls it: what a driver installs has the name of `rt.cuda.probe.DRIVER`, and may lie where no linker looks.

    Raises:
        BackendUnavailableError: As `cuda_home`.
    """
    from torch.utils import cpp_extension

    home, before = cuda_home(), cpp_extension.CUDA_HOME
    with tempfile.TemporaryDirectory() as folder:
        if (library := driver_library()) is not None:
            Path(folder, "libcuda.so").symlink_to(library)
        # https://gcc.gnu.org/onlinedocs/gcc/Environment-Variables.html
        paths = filter(None, (folder, str(home / STUBS), os.environ.get("LIBRARY_PATH")))
        cpp_extension.CUDA_HOME = str(home)
        try:
            with environment(LIBRARY_PATH=os.pathsep.join(paths)):
                yield
        finally:
            cpp_extension.CUDA_HOME = before
