"""Stage two: text encoder and U-Net learn together, on cached latents.

v-prediction (Salimans & Ho 2022, arXiv:2202.00512) with captions left out now and then (Ho & Salimans 2022,
arXiv:2207.12598).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from dataset import Examples
from model import SCHEDULE, Model, for_training
from render import grid

UNGUIDED = 0.1
"""The part of the rows that learn without their caption."""
PREVIEW_COLUMNS = 12


@dataclass(frozen=True)
class Batch:
    """Rows on the device: which examples, their latents and noise [N, 4, h, w], timesteps [N], words [N, 16, D]."""

    chosen: Tensor
    clean: Tensor
    noise: Tensor
    timesteps: Tensor
    words: Tensor


class DiffusionTask:
    """Denoising of latents under their captions.

    Args:
        model: Whose U-Net and text encoder are trained.
        examples: What they learn from.
        rows: Of this worker's batches.
        prompts: For the previews.
    """

    name = "diffusion"
    steps, guidance = 20, 4.0
    """Of the previews."""

    def __init__(self, model: Model, examples: Examples, rows: int, prompts: list[str]):
        for_training(model.unet)
        self.modules = nn.ModuleDict({"unet": model.unet, "text_encoder": model.text_encoder})
        self.model = model
        self._examples, self._rows, self._prompts = examples, rows, prompts
        self._scheduler = DDIMScheduler(**SCHEDULE)
        self._no_words = model.tokenize([""])

    def loss(self, rng: torch.Generator) -> Tensor:
        """Mean squared error of the velocity."""
        batch = self._draw(rng)
        noisy = self._scheduler.add_noise(batch.clean, batch.noise, batch.timesteps)
        velocity = self._scheduler.get_velocity(batch.clean, batch.noise, batch.timesteps)
        seen = self._see(noisy, batch)
        predicted = self.model.unet(seen, batch.timesteps, batch.words, return_dict=False)[0]
        return F.mse_loss(predicted.float(), velocity)

    def _see(self, noisy: Tensor, batch: Batch) -> Tensor:
        """What the U-Net gets to see, [N, channels, h, w]."""
        return noisy

    def _draw(self, rng: torch.Generator) -> Batch:
        device = self.model.unet.device
        chosen = torch.randint(len(self._examples.ids), (self._rows,), generator=rng)
        ids = self._examples.ids[chosen]
        ids = torch.where(torch.rand(self._rows, 1, generator=rng) < UNGUIDED, self._no_words, ids)
        # One timestep from each part of the schedule: the mean of independent ones with less noise in it.
        parts = torch.arange(self._rows) + torch.rand(self._rows, generator=rng)
        timesteps = (parts * SCHEDULE["num_train_timesteps"] / self._rows).long()
        clean = self._examples.latents[chosen].float()
        return Batch(
            chosen,
            clean.to(device),
            torch.randn(clean.shape, generator=rng).to(device),
            # The last part may round up to the end, where there is no timestep.
            timesteps.clamp(max=SCHEDULE["num_train_timesteps"] - 1).to(device),
            self.model.text_encoder(ids.to(device)).last_hidden_state,
        )

    def pipeline(self) -> StableDiffusionPipeline:
        """The whole in diffusers' words."""
        return self.model.pipeline()

    def export(self, folder: Path) -> None:
        """The whole in float16, in diffusers' layout."""
        self.pipeline().to(torch.float16).save_pretrained(folder)

    def preview(self, path: Path) -> None:
        """A picture of every prompt, from the same noise every time."""
        pictures = self.pipeline()(
            self._prompts,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=[torch.Generator().manual_seed(i) for i in range(len(self._prompts))],
            output_type="np",
        ).images
        grid(list((pictures * 255).round().astype(np.uint8)), PREVIEW_COLUMNS).save(path)
