"""All parts, and the plans of which part comes when.

Estimates are for an H200 with 16 cores, made by hand: nothing has been measured yet. Each part fits into a command of
ten minutes; what a build or a compiler had ready when it was stopped is in its cache the next time.
"""

from __future__ import annotations

from dataclasses import dataclass

from rt.bench.gpu_parts.part import Part
from rt.bench.gpu_parts.settings import (
    CHOSEN,
    COMPILED,
    DIFFUSERS,
    OURS,
    OURS_FP8,
    OURS_TUNED,
    REDUCED,
)

TITLES = {
    "sd15": "SD 1.5, 512 × 512",
    "sd21": "SD 2.1, 768 × 768",
    "sdxl": "SDXL, 1024 × 1024",
    "sdxl-turbo": "SDXL-Turbo, 512 × 512",
}
_FP8_CAPABILITY = 89
_INTERPRETED = {"TRITON_INTERPRET": "1"}


def _packages(name: str, title: str, minutes: float, *, tried: bool) -> Part:
    return Part(
        name=name,
        title=title,
        minutes=minutes,
        module="packages",
        arguments={"tried": tried},
        reads_packages=True,
        fresh=True,
    )


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
        fresh=True,
    )


PARTS = (
    Part(name="environment", title="What a build finds here", minutes=0.2, module="environment"),
    Part(name="ceilings", title="What the machine can do", minutes=0.5, module="ceilings"),
    _packages("packages", "Packages compiled elsewhere", 1.4, tried=False),
    _packages("packages-tried", "Packages compiled elsewhere, convolutions tried out", 1.3, tried=True),
    Part(
        name="ratio",
        title="The step of SD 1.5, compiled elsewhere",
        minutes=1.1,
        module="steps",
        arguments={"candidates": (OURS, REDUCED)},
        reads_packages=True,
    ),
    Part(name="selftest", title="The self-test", minutes=1.2, module="selftest"),
    Part(
        name="kernels",
        title="Kernels against their references",
        minutes=1.1,
        module="kernels",
        dry_environment=_INTERPRETED,
    ),
    Part(name="payloads", title="Plugin payloads", minutes=1.2, module="payloads"),
    Part(
        name="timings-chosen",
        title="Chosen kernels against torch",
        minutes=0.6,
        module="timings",
        arguments={"chosen": CHOSEN},
        dry_environment=_INTERPRETED,
    ),
    Part(
        name="timings",
        title="Kernels against torch",
        minutes=8.5,
        module="timings",
        dry_environment=_INTERPRETED,
    ),
    Part(
        name="demo-fp16",
        title="The demo model against the CPU, fp16 alone",
        minutes=1.9,
        module="demo",
        arguments={"formats": ("fp16",)},
    ),
    Part(
        name="demo",
        title="The demo model against the CPU",
        minutes=4.5,
        module="demo",
        arguments={"formats": ("fp32", "fp16")},
    ),
    Part(
        name="step-sd15",
        title="The step of SD 1.5, max-autotune",
        minutes=3.7,
        module="steps",
        arguments={"candidates": (REDUCED, OURS_TUNED)},
    ),
    _build("sd15", 5.0),
    _model("sd15", 8.0),
    Part(
        name="ablation",
        title="What each pass and each graph is worth",
        minutes=2.0,
        module="ablation",
        needs=("build-sd15",),
    ),
    _build("sdxl", 8.0),
    _model("sdxl", 8.5),
    _build("sdxl-turbo", 8.0),
    _model("sdxl-turbo", 8.0),
    _build("sd21", 5.0),
    _model("sd21", 8.0),
    Part(name="fp8", title="Linear layers in fp8", minutes=0.5, module="fp8"),
    Part(
        name="build-sd15-fp8",
        title=f"Build of {TITLES['sd15']}, fp8",
        minutes=8.5,
        module="bundles",
        arguments={"setting": "sd15", "dtype": "fp8"},
        least_capability=_FP8_CAPABILITY,
    ),
    Part(
        name="sd15-fp8",
        title=f"{TITLES['sd15']}, fp8 as an option",
        minutes=3.5,
        module="models",
        arguments={"setting": "sd15", "candidates": (DIFFUSERS, OURS, OURS_FP8)},
        needs=("build-sd15", "build-sd15-fp8"),
        least_capability=_FP8_CAPABILITY,
        fresh=True,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do with so many minutes.

    Attributes:
        name: For `--plan`.
        minutes: For all of it, by its parts' estimates.
        parts: Their names, in order.
    """

    name: str
    minutes: float
    parts: tuple[str, ...]


_BRIEF = ("packages", "packages-tried", "ratio", "timings-chosen", "demo-fp16", "step-sd15")
"""Parts of the first minutes, of which a whole run has more."""
PLANS = {
    plan.name: plan
    for plan in (
        # By worth, so that what a slice that is cut off lacks is what matters least.
        Plan(
            name="first",
            minutes=9.0,
            parts=(
                "environment",
                "packages",
                "packages-tried",
                "selftest",
                "demo-fp16",
                "ratio",
                "kernels",
                "timings-chosen",
            ),
        ),
        # On a machine that is still warm, so that the compiler finds what `ratio` left in its cache.
        Plan(name="second", minutes=4.0, parts=("step-sd15",)),
        Plan(name="all", minutes=25.0, parts=tuple(part.name for part in PARTS if part.name not in _BRIEF)),
    )
}
