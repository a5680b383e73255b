"""A variant that needs four steps and no guidance: a latent consistency model (Luo et al. 2023, arXiv:2310.04378).

The student says at once where the teacher's guided path from a noisy latent ends. It learns that from two neighbouring
points of a path: what it says at the noisier one shall be what it says at the other, and at the end the latent itself.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from diffusion import DiffusionTask
from model import SCHEDULE, Model

TEACHER_STEPS = 20
"""Points of the teacher's path, by DDIM. Few, for what is known at the end has to travel all the way up."""
GUIDANCE = 4.0
HUBER = 0.001


class LcmTask(DiffusionTask):
    """Consistency along the guided path of `model`, which is the teacher and stays as it is."""

    name = "lcm"
    steps, guidance = 4, 1.0

    def __init__(self, model: Model, *args: Any):
        super().__init__(replace(model, unet=copy.deepcopy(model.unet).requires_grad_(True)), *args)
        self.modules = nn.ModuleDict({"unet": self.model.unet})
        self._teacher = model.unet

    def loss(self, rng: torch.Generator) -> Tensor:
        """Pseudo-Huber distance of what the student says at two neighbouring points."""
        batch = self._draw(rng)
        stride = SCHEDULE["num_train_timesteps"] // TEACHER_STEPS
        later = (batch.timesteps // stride + 1) * stride - 1
        sooner = later - stride
        noisy = self._scheduler.add_noise(batch.clean, batch.noise, later)
        with torch.no_grad():
            nothing = self.model.text_encoder(self._no_words.to(noisy.device)).last_hidden_state
            both = self._teacher(
                torch.cat([noisy, noisy]),
                torch.cat([later, later]),
                torch.cat([nothing.expand_as(batch.words), batch.words]),
                return_dict=False,
            )[0]
            unguided, guided = both.float().chunk(2)
            less_noisy = self._ddim(noisy, unguided + GUIDANCE * (guided - unguided), later, sooner)
            said = self._ending(less_noisy, sooner.clamp(min=0), batch.words)
            target = torch.where((sooner < 0)[:, None, None, None], less_noisy, said)
        distance = self._ending(noisy, later, batch.words) - target
        return ((distance.square() + HUBER**2).sqrt() - HUBER).mean()

    def _ending(self, noisy: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        """The clean latents that the student's velocity points at."""
        velocity = self.model.unet(noisy, timesteps, words, return_dict=False)[0].float()
        signal, noise = self._levels(timesteps)
        return signal * noisy - noise * velocity

    def _ddim(self, noisy: Tensor, velocity: Tensor, later: Tensor, sooner: Tensor) -> Tensor:
        """One step of DDIM (Song et al. 2021, arXiv:2010.02502); below timestep 0 is the clean latent."""
        signal, noise = self._levels(later)
        clean, direction = signal * noisy - noise * velocity, noise * noisy + signal * velocity
        signal, noise = self._levels(sooner)
        return signal * clean + noise * direction

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        cumulative = self._scheduler.alphas_cumprod.to(timesteps.device)[timesteps.clamp(min=0)]
        cumulative = torch.where(timesteps < 0, 1.0, cumulative)[:, None, None, None]
        return cumulative.sqrt(), (1 - cumulative).sqrt()

    def pipeline(self) -> StableDiffusionPipeline:
        """The whole in diffusers' words."""
        pipeline = self.model.pipeline()
        settings = {name: value for name, value in SCHEDULE.items() if name != "timestep_spacing"}
        pipeline.scheduler = LCMScheduler(**settings, original_inference_steps=TEACHER_STEPS)
        return pipeline
