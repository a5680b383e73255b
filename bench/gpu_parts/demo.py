"""The demo model on the GPU: the pictures that diffusers draws on the CPU in fp32, from the same noise.

Run in a checkout. fp32 has to be the same picture, fp16 very nearly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from numpy.typing import NDArray

from rt.bench.gpu_parts.built import Built
from rt.bench.gpu_parts.part import Context, Figures
from rt.bench.gpu_parts.place import find
from rt.config import DType
from rt.errors import CheckpointError
from rt.export.build import build, default_profiles
from rt.export.checkpoint import open_checkpoint

FOLDER = Path("examples/emoji-ldm")
PROMPTS = ("a red heart", "a panda", "a pizza on a blue background", "a fox left of a sunflower")
FP32_LEVELS, FP16_DB = 2.0, 35.0
"""The most that a value of a picture may differ in fp32, of 255; the least PSNR in fp16."""

Picture = NDArray[np.float32]


def run(context: Context, formats: Sequence[str]) -> Iterator[Figures]:
    """See the module. `pictures`, a row a format.

    Args:
        context: Of the run.
        formats: Of the builds; a dry run has fp32.

    Raises:
        CheckpointError: The demo model is not here.
    """
    find(context)
    if not (FOLDER / "model_index.json").is_file():
        raise CheckpointError(f"{FOLDER} is not here: run this part in a checkout")
    prompts, steps = (PROMPTS[:1], 2) if context.dry else (PROMPTS, 20)
    checkpoint = open_checkpoint(str(FOLDER))
    [profile] = default_profiles(checkpoint)
    shape = checkpoint.spec.latent_shape(profile.height, profile.width)
    noise = np.random.default_rng(context.seed).standard_normal((len(prompts), *shape), np.float32)
    expected = _on_cpu(prompts, noise, steps)
    rows: list[dict[str, Any]] = []
    for dtype in (DType.FP32,) if context.dry else map(DType, formats):
        built = Built.at(context.scratch, "emoji-ldm", dtype, dry=context.dry)
        # As a user builds it, and without tuning: its pictures are what counts.
        built.build(profile, partial(build, checkpoint, force=True, quiet=True), max_autotune=False)
        pipe = built.open()
        drawn = [
            pipe(
                prompt, num_inference_steps=steps, latents=latents[None], scheduler="ddim", output_type="np"
            ).images[0]
            for prompt, latents in zip(prompts, noise, strict=True)
        ]
        levels = 255 * max(float(np.abs(a - b).max()) for a, b in zip(drawn, expected, strict=True))
        psnr = min(_psnr(a, b) for a, b in zip(drawn, expected, strict=True))
        passed = levels <= FP32_LEVELS if dtype is DType.FP32 else psnr >= FP16_DB
        rows.append(
            {
                "dtype": dtype.value,
                "backend": pipe.engines.backend.name,
                "pictures": len(prompts),
                "steps": steps,
                "levels": levels,
                "psnr_db": psnr,
                "passed": passed,
            }
        )
        yield {"pictures": rows}


def _on_cpu(prompts: tuple[str, ...], noise: Picture, steps: int) -> list[Picture]:
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    images: list[Picture] = [
        pipeline(
            prompt, num_inference_steps=steps, latents=torch.from_numpy(latents[None]), output_type="np"
        ).images[0]
        for prompt, latents in zip(prompts, noise, strict=True)
    ]
    return images


def _psnr(one: Picture, other: Picture) -> float:
    """Of values in [0, 1]; at most 200, where they are equal."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return 10 * float(np.log10(1 / max(error, 1e-20)))
