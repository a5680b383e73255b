"""The models that are timed, each at one size, and what is timed of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

UNET, VAE, PICTURE = "unet", "vae", "picture"
OURS, OURS_FP8, DIFFUSERS, COMPILED = "rt", "rt fp8", "diffusers", "torch.compile"
"""Candidates; a kernel of ours is called as the first, too."""
OURS_TUNED, REDUCED = "rt, max-autotune", "torch.compile, reduce-overhead"
"""Candidates where the step is measured alone; ours is then one that was compiled elsewhere, without tuning."""
CHOSEN = (
    ("attention", "sd15 4096x40"),
    ("attention", "sd15 1024x80"),
    ("attention", "sdxl 4096x64"),
    ("attention", "sdxl 1024x64"),
    ("attention", "vae 1024"),
    ("group_norm", "sd15 64x64x320"),
    ("group_statistics", "sdxl 128x128x320"),
    ("group_normalize", "sdxl 128x128x320"),
    ("geglu_linear", "sd15 4096x320"),
    ("geglu_linear", "sdxl 1024x1280"),
    ("geglu", "sd15 4096x1280"),
    ("geglu", "sdxl 1024x5120"),
)
"""Kernels and workloads of theirs in which most of the time goes, or which a decision hangs on."""
STEP = "sd15-step"
"""The guided step of SD 1.5 as a package by itself."""
PREPARED = (
    STEP,
    "sd15-step-fused",
    "sd15-decoder",
    "sdxl-step",
    "sdxl-step-fused",
    "sdxl-decoder",
    "sdxl-turbo-step",
)
"""What `--prepare` makes: architecture, side, whether with guidance, U-Net step or decoder."""
GUIDANCE_SCALE = 7.5

_DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
_TRAILING = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model at one size, batch 1.

    Attributes:
        name: For people and `--only`.
        architecture: Of `rt.export.architectures`.
        side: Of the picture, in pixels.
        guided: Whether by classifier-free guidance, which makes two rows of each.
        steps: Of the pictures that are timed.
        sampler: What differs from the scheduler of the architecture.
        bars_ms: Measure to the most that ours may take on an H100.
        bars_faster: Measure to the least by which ours is to be faster there than torch.compile, max-autotune.
    """

    name: str
    architecture: str
    side: int
    guided: bool
    steps: tuple[int, ...]
    sampler: Mapping[str, Any]
    bars_ms: Mapping[str, float]
    bars_faster: Mapping[str, float] = field(default_factory=dict)

    def tiny(self) -> Setting:
        """The same at a size for a dry run."""
        return replace(self, side=32, steps=(1,))


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            name="sd15",
            architecture="sd15",
            side=512,
            guided=True,
            steps=(20,),
            sampler=_DDIM,
            bars_ms={UNET: 4.0},
            bars_faster={UNET: 1.5},
        ),
        Setting(
            name="sd21", architecture="sd21", side=768, guided=True, steps=(20,), sampler=_DDIM, bars_ms={}
        ),
        Setting(
            name="sdxl",
            architecture="sdxl",
            side=1024,
            guided=True,
            steps=(20,),
            sampler={},
            bars_ms={UNET: 34.0, VAE: 25.0},
            bars_faster={UNET: 1.25},
        ),
        Setting(
            name="sdxl-turbo",
            architecture="sdxl",
            side=512,
            guided=False,
            steps=(1, 4),
            sampler=_TRAILING,
            bars_ms={f"{PICTURE} 4": 35.0},
        ),
    )
}


def measure_name(measure: str) -> str:
    """For people."""
    steps = measure.removeprefix(PICTURE).strip()
    return {UNET: "U-Net step", VAE: "VAE decoder"}.get(measure, f"{steps}-step picture")
