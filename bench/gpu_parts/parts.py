"""All parts in the order in which they are run: what others are held against first, then the dearest.

Estimates are for an H100 with 16 cores. Each fits into a command of ten minutes; what a build or a compiler had ready
when it was stopped is in its cache the next time.
"""

from __future__ import annotations

from rt.bench.gpu_parts.part import Part
from rt.bench.gpu_parts.settings import COMPILED, DIFFUSERS, OURS, OURS_FP8

TITLES = {
    "sd15": "SD 1.5, 512 × 512",
    "sd21": "SD 2.1, 768 × 768",
    "sdxl": "SDXL, 1024 × 1024",
    "sdxl-turbo": "SDXL-Turbo, 512 × 512",
}
_FP8_CAPABILITY = 89


def _build(setting: str, minutes: float) -> Part:
    return Part(
        name=f"build-{setting}",
        title=f"Build of {TITLES[setting]}",
        minutes=minutes,
        module="bundles",
        arguments={"setting": setting},
    )


def _model(setting: str, minutes: float) -> Part:
    return Part(
        name=setting,
        title=TITLES[setting],
        minutes=minutes,
        module="models",
        # The dearest to prepare last: what the others showed is kept before it begins.
        arguments={"setting": setting, "candidates": (DIFFUSERS, OURS, COMPILED)},
        needs=(f"build-{setting}",),
    )


PARTS = (
    Part(name="ceilings", title="What the machine can do", minutes=0.5, module="ceilings"),
    Part(
        name="kernels",
        title="Kernels against their references",
        minutes=3.0,
        module="kernels",
        dry_environment={"TRITON_INTERPRET": "1"},
    ),
    Part(name="payloads", title="Plugin payloads", minutes=1.0, module="payloads"),
    Part(
        name="timings",
        title="Kernels against torch",
        minutes=7.0,
        module="timings",
        dry_environment={"TRITON_INTERPRET": "1"},
    ),
    Part(name="demo", title="The demo model against the CPU", minutes=4.0, module="demo"),
    _build("sd15", 6.0),
    _model("sd15", 5.0),
    Part(
        name="ablation",
        title="What each pass and each graph is worth",
        minutes=2.0,
        module="ablation",
        needs=("build-sd15",),
    ),
    _build("sdxl", 8.0),
    _model("sdxl", 8.0),
    _build("sdxl-turbo", 8.0),
    _model("sdxl-turbo", 6.0),
    _build("sd21", 6.0),
    _model("sd21", 5.0),
    Part(name="fp8", title="Linear layers in fp8", minutes=0.5, module="fp8"),
    Part(
        name="build-sd15-fp8",
        title=f"Build of {TITLES['sd15']}, fp8",
        minutes=8.0,
        module="bundles",
        arguments={"setting": "sd15", "dtype": "fp8"},
        least_capability=_FP8_CAPABILITY,
    ),
    Part(
        name="sd15-fp8",
        title=f"{TITLES['sd15']}, fp8 as an option",
        minutes=2.5,
        module="models",
        arguments={"setting": "sd15", "candidates": (DIFFUSERS, OURS, OURS_FP8)},
        needs=("build-sd15", "build-sd15-fp8"),
        least_capability=_FP8_CAPABILITY,
    ),
)
