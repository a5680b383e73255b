"""`BuildConfig`: everything that shapes the output of a build."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from rt.decode import decode
from rt.errors import ConfigError
from rt.shapes import ShapeProfile


class DType(str, Enum):
    """Number format of weights and arithmetic; an engine never computes in fewer bits than this.

    INT8 is of the U-Net's linear layers and convolutions; the rest is fp32 in the file and at least bf16 in an engine.
    FP8 (e4m3) is of its linear layers; the rest is fp16.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What `rt build` was asked for.

    Attributes:
        profiles: The shapes to build engines for; the first is the default of `rt run`.
        dtype: Format of weights and arithmetic.
        backend: The engine that the build is verified with and that `rt run` prefers; "auto" before it is chosen.
        step_cache: Whether steps of the U-Net can reuse deep features (`rt run --step-cache`).
        refittable: TensorRT: whether the weights of a plan can be replaced, as `--refit` of a later build does.
        portable: TensorRT: whether plans run on every GPU since Ampere, rather than on this machine's model alone.
        tune: TensorRT: whether each fused operator is timed as our kernel and as the engine's own, and the faster kept.
        max_autotune: Inductor: whether products are timed in every way it knows, and the fastest kept.
    """

    profiles: tuple[ShapeProfile, ...]
    dtype: DType = DType.FP32
    backend: str = "openvino"
    step_cache: bool = False
    refittable: bool = False
    portable: bool = False
    tune: bool = False
    max_autotune: bool = False

    def __post_init__(self) -> None:
        if not self.profiles:
            raise ConfigError("a build needs at least one shape profile")
        if len(set(self.profiles)) != len(self.profiles):
            raise ConfigError("a shape profile is given twice; give each size and batch size once")

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; `from_json` is the inverse."""
        return {**asdict(self), "dtype": self.dtype.value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BuildConfig:
        """From what `to_json` gave; raises as `decode`."""
        return decode(cls, data, "config")


def fingerprint(*parts: object) -> str:
    """sha256 (hex) of JSON values, independent of the order of keys."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
