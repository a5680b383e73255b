"""Every kernel by name. A new one is a file that holds `SPEC`, and its name here.

Kernels import Triton and torch, so each is imported when it is asked for.
"""

from __future__ import annotations

import importlib

from rt.errors import ConfigError, nearest
from rt.extras import needs
from rt.kernels.spec import KernelSpec

NAMES = (
    "attention",
    "feed",
    "geglu",
    "geglu_linear",
    "group_norm",
    "group_normalize",
    "group_statistics",
    "guidance_rescale",
    "guide_and_step",
    "layer_norm",
    "philox",
    "query_attention",
    "select_rows",
    "self_attention",
    "to_pixels",
)
DESCRIBED = ("geglu_linear_tma",)
"""Kernels that read through TMA descriptors, `KernelSpec.descriptors`: for Triton's launcher and inductor alone."""


def spec(name: str) -> KernelSpec:
    """The kernel of that name.

    Raises:
        ConfigError: When there is none.
        BackendUnavailableError: When Triton or torch is missing.
    """
    names = (*NAMES, *DESCRIBED)
    if name not in names:
        raise ConfigError(f"no kernel {name!r}{nearest(name, names)}; kernels: {', '.join(names)}")
    with needs("gpu", "a GPU kernel"):
        found: KernelSpec = importlib.import_module(f"rt.kernels.{name}").SPEC
    return found


def specs() -> dict[str, KernelSpec]:
    """Those of `NAMES`, by name."""
    return {name: spec(name) for name in NAMES}
