"""The table of `docs/benchmarks.md` on what programs launch: the oldest record beside the newest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rt.bench.markdown import table

KIND = "launches"
"""The field by which a record of these is known among the others of `bench/results/`."""
TITLES = {
    "sd15-step": "SD 1.5, 512 × 512, guided step",
    "sd15-step-fused": "the same, linear layers in our kernels where that saves a launch",
    "sdxl-step": "SDXL, 1024 × 1024, guided step",
    "sdxl-step-fused": "the same, linear layers in our kernels where that saves a launch",
    "sd15-decoder": "decoder, 512 × 512",
    "sdxl-decoder": "decoder, 1024 × 1024",
}
_LIBRARIES = ("product", "convolution")


def render(records: Iterable[Mapping[str, Any]]) -> str:
    """Programs by launches, and the bytes that pass through memory between products and convolutions."""
    counted = [
        {program["program"]: program for program in record["programs"]}
        for record in records
        if record.get("kind") == KIND
    ]
    if not counted:
        return "not counted yet"
    before, after = counted[0], counted[-1]
    rows = []
    for name, title in TITLES.items():
        if name in after:
            old, new = before.get(name, before.get(name.removesuffix("-fused"))), after[name]
            rows.append((title, _pair(old, new, _launches), _pair(old, new, _gigabytes)))
    return table(("program", "launches", "GB beside products and convolutions"), rows)


def _pair(old: Mapping[str, Any] | None, new: Mapping[str, Any], show: Any) -> str:
    return show(new) if old is None else f"{show(old)} → {show(new)}"


def _launches(program: Mapping[str, Any]) -> str:
    return str(program["launches"])


def _gigabytes(program: Mapping[str, Any]) -> str:
    mib = sum(size for kind, size in program["mib_by_kind"].items() if kind not in _LIBRARIES)
    return f"{mib * 2**20 / 1e9:.1f}"
