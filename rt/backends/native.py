"""Our own CPU kernels, as an extension of OpenVINO: `cmake --install` puts the library into `rt/_native/`.

Everything runs without it, slower. It computes bf16 with AVX-512; with AMX, OpenVINO's own tiles are faster.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LIBRARY = Path(__file__).parents[1] / "_native" / "librt_openvino.so"
GPU_LIBRARY = LIBRARY.with_name("librt_kernels.so")
BUILD = "cmake -S . -B build/native && cmake --build build/native && cmake --install build/native"
BEST = "avx512"


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What the library offers on this machine: its instruction set, or the reason why it is not used."""

    instruction_set: str | None
    problem: str = ""

    def __bool__(self) -> bool:
        return self.instruction_set is not None


def kernels(library: Path = LIBRARY) -> Kernels:
    """Whether the kernels pay here. Loads the library, which needs OpenVINO's to be loaded first; never raises."""
    if not library.exists():
        return Kernels(
            instruction_set=None,
            problem=f"not built, OpenVINO's own kernels are used; in a checkout run: {BUILD}",
        )
    return _open(library, os.environ.get("RT_ISA", ""))


@cache
def _open(library: Path, forced: str) -> Kernels:
    try:
        opened = ctypes.CDLL(str(library))
    except OSError as error:  # another version of OpenVINO than it was built for
        return Kernels(
            instruction_set=None, problem=f"built for another OpenVINO ({error}); run again: {BUILD}"
        )
    opened.rt_instruction_set.restype = ctypes.c_char_p
    name = opened.rt_instruction_set().decode()
    if forced and name == forced:
        return Kernels(instruction_set=name)
    if forced:
        return Kernels(
            instruction_set=None, problem=f"RT_ISA={forced} is not an instruction set of this processor"
        )
    if opened.rt_has_amx():
        return Kernels(
            instruction_set=None, problem="this processor has AMX, where OpenVINO's own kernels are used"
        )
    if name != BEST:
        return Kernels(
            instruction_set=None, problem="this processor computes no bf16, OpenVINO's own kernels are used"
        )
    return Kernels(instruction_set=name)


def gpu_images(library: Path = GPU_LIBRARY) -> int:
    """Kernels in the library for C and C++ hosts on GPUs, which rt itself does not use; 0 where none can be loaded.

    A library of that name that was installed by an older build has none that can be asked for.
    """
    try:
        count = ctypes.CDLL(str(library)).rt_kernel_count
    except (OSError, AttributeError):
        return 0
    count.restype = ctypes.c_size_t
    return int(count())
