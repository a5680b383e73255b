"""A variant that needs four steps and no guidance, drawn with like a latent consistency model (arXiv:2310.04378).

The student says at once where the teacher's guided path from a noisy latent ends. A consistency model learns that from
neighbouring points of the path (Luo et al. 2023), and what is known at the end has to travel all the way up. This
teacher is so small that its paths can be walked to their ends beforehand, so the student learns the ends themselves
(Luhman & Luhman 2021, arXiv:2101.02388), from the four timesteps at which it will be asked.

All of its weights learn, and what they have over the teacher's is kept as a LoRA.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from config import Config
from dataset import BATCH, Examples
from diffusion import DiffusionTask
from loop import Workers, save_whole
from lora import difference, save_lora
from model import SCHEDULE, Model

ASKED = (999, 759, 499, 259)
"""What LCM's schedule makes of four steps."""
TEACHER_STEPS = 12
"""Of a whole path, by DDIM; one that begins later has fewer."""
GUIDANCE = 4.0
RANK = 48
HUBER = 0.001
_NOISE = DDIMScheduler(**SCHEDULE)


@dataclass(frozen=True)
class Paths:
    """Where guided paths begin and end.

    Attributes:
        begins: float16 [N, 4, h, w], noisy latents.
        timesteps: int64 [N], how noisy.
        ends: Clean latents, and the tokens of the captions that guided.
    """

    begins: Tensor
    timesteps: Tensor
    ends: Examples


@torch.no_grad()
def walk_paths(run: Path, config: Config, workers: Workers, model: Model, examples: Examples) -> Paths:
    """Walks `config.paths` paths of `model` from noisy examples, or takes what an earlier run has left."""
    path = run / f"paths-{workers.rank}-of-{workers.count}.pt"
    if not path.exists():
        device = workers.device
        parts = []
        for index in range(config.paths // workers.count // BATCH):
            rng = torch.Generator().manual_seed(index * workers.count + workers.rank)
            chosen = torch.randint(len(examples.ids), (BATCH,), generator=rng)
            clean, ids = examples.latents[chosen].float(), examples.ids[chosen]
            timesteps = torch.full((BATCH,), ASKED[index % len(ASKED)])
            noise = torch.randn(clean.shape, generator=rng)
            begins = _NOISE.add_noise(clean, noise, timesteps)
            with torch.autocast(device.type, torch.bfloat16):
                ends = _walk(model, begins.to(device), int(timesteps[0]), ids.to(device))
            parts.append((begins.half(), timesteps, ends.half().cpu(), ids))
        save_whole([torch.cat(column) for column in zip(*parts, strict=True)], path)
    begins, timesteps, ends, ids = torch.load(path)
    return Paths(begins, timesteps, Examples(ends, ids))


def _walk(model: Model, latents: Tensor, timestep: int, ids: Tensor) -> Tensor:
    """The end of the guided path that begins at `timestep`; DDIM (Song et al. 2021, arXiv:2010.02502)."""
    captions = model.text_encoder(ids).last_hidden_state
    nothing = model.text_encoder(model.tokenize([""]).to(ids.device)).last_hidden_state
    words = torch.cat([nothing.expand_as(captions), captions])
    steps = round(TEACHER_STEPS * (timestep + 1) / SCHEDULE["num_train_timesteps"])
    points = [round((timestep + 1) * k / steps) - 1 for k in range(steps, -1, -1)]
    for later, sooner in pairwise(points):
        both = torch.cat([latents, latents])
        unguided, guided = model.unet(both, later, words, return_dict=False)[0].float().chunk(2)
        velocity = unguided + GUIDANCE * (guided - unguided)
        signal, noise = _levels(torch.tensor(later))
        clean, direction = signal * latents - noise * velocity, noise * latents + signal * velocity
        signal, noise = _levels(torch.tensor(sooner)) if sooner >= 0 else (1.0, 0.0)
        latents = signal * clean + noise * direction
    return latents


def _levels(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """How much of a latent is signal and how much is noise at these timesteps, on the CPU."""
    cumulative = _NOISE.alphas_cumprod[timesteps]
    return cumulative.sqrt(), (1 - cumulative).sqrt()


class LcmTask(DiffusionTask):
    """The ends of the paths of `model`, which is the teacher and stays as it is."""

    name = "lcm"
    steps, guidance = 4, 1.0

    def __init__(self, model: Model, paths: Paths, rows: int, prompts: list[str]):
        student = copy.deepcopy(model.unet).requires_grad_(True)
        super().__init__(replace(model, unet=student), paths.ends, rows, prompts)
        self.modules = nn.ModuleDict({"unet": student})
        self._teacher, self._paths = model.unet, paths

    def loss(self, rng: torch.Generator) -> Tensor:
        """Pseudo-Huber distance of what the student says from where the path ends."""
        device, ends = self.model.unet.device, self._paths.ends
        chosen = torch.randint(len(ends.ids), (self._rows,), generator=rng)
        begins, timesteps = self._paths.begins[chosen].float(), self._paths.timesteps[chosen]
        words = self.model.text_encoder(ends.ids[chosen].to(device)).last_hidden_state
        velocity = self.model.unet(begins.to(device), timesteps.to(device), words, return_dict=False)[0]
        signal, noise = (level[:, None, None, None].to(device) for level in _levels(timesteps))
        said = signal * begins.to(device) - noise * velocity.float()
        distance = said - ends.latents[chosen].to(device)
        return ((distance.square() + HUBER**2).sqrt() - HUBER).mean()

    def pipeline(self) -> StableDiffusionPipeline:
        """The whole in diffusers' words."""
        pipeline = self.model.pipeline()
        settings = {name: value for name, value in SCHEDULE.items() if name != "timestep_spacing"}
        pipeline.scheduler = LCMScheduler(**settings)
        return pipeline

    def export(self, folder: Path) -> None:
        """As ``FOLDER/lcm.safetensors``."""
        save_lora(difference(self._teacher, self.model.unet, RANK), folder / f"{self.name}.safetensors")
