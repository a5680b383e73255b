"""A variant that paints into a picture: a U-Net with five more inputs, the mask and the latents around it.

As in Stable Diffusion's inpainting models (Rombach et al. 2022, arXiv:2112.10752): the new inputs begin with weights of
zero, so that training begins with the model that draws from text alone.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from config import Config
from dataset import Hole
from diffusion import PREVIEW_COLUMNS, Batch, DiffusionTask
from model import SCHEDULE, Model
from render import Renderer, grid
from world import Scene, draw, load

ENDS = ("conv_in.weight", "conv_out.weight")


def widened(model: Model) -> Model:
    """The same model with a U-Net that reads latents, mask and surroundings."""
    old = model.unet
    channels = old.config.in_channels
    unet = UNet2DConditionModel.from_config(old.config, in_channels=2 * channels + 1)
    weights = copy.deepcopy(old.state_dict())
    narrow = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([narrow, narrow.new_zeros(len(narrow), channels + 1, 3, 3)], dim=1)
    unet.load_state_dict(weights)
    return replace(model, unet=unet)


def holes(size: int) -> Hole:
    """Random holes for pictures of `size` pixels: mostly around one emoji, sometimes a rectangle or everything."""

    def hole(scene: Scene, rng: np.random.Generator) -> np.ndarray:
        kind = rng.random()
        if kind < 0.1:
            return np.ones((size, size), np.float32)
        if kind < 0.7:
            placed = scene.placed[rng.integers(len(scene.placed))]
            centre, reach = np.array(placed.centre), placed.side / 2 + rng.uniform(0.0, 0.08, 2)
        else:
            centre, reach = rng.uniform(0.2, 0.8, 2), rng.uniform(0.1, 0.4, 2)
        return rectangle(centre, reach, size)

    return hole


def rectangle(centre: np.ndarray, reach: np.ndarray, size: int) -> np.ndarray:
    """A mask, float32 [size, size], that is 1 up to `reach` (x, y) around `centre`, in parts of the picture."""
    (left, top), (right, bottom) = (
        np.clip(np.round((centre + sign * reach) * size), 0, size).astype(int) for sign in (-1, 1)
    )
    mask = np.zeros((size, size), np.float32)
    mask[top:bottom, left:right] = 1
    return mask


class InpaintingTask(DiffusionTask):
    """Denoising under caption, mask and surroundings; the text encoder stays as it is."""

    name = "inpainting"

    def __init__(self, model: Model, config: Config, *args: Any):
        super().__init__(model, *args)
        self.modules = nn.ModuleDict({"unet": model.unet})
        self._config = config

    def _see(self, noisy: Tensor, batch: Batch) -> Tensor:
        masks, around = self._examples.masks[batch.chosen], self._examples.around[batch.chosen]
        return torch.cat([noisy, masks.to(noisy), around.to(noisy)], dim=1)

    def pipeline(self) -> StableDiffusionInpaintPipeline:
        """The whole in diffusers' words."""
        text_to_image = self.model.pipeline()
        parts = {**text_to_image.components, "scheduler": DDIMScheduler(**SCHEDULE)}
        pipeline = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def export(self, folder: Path) -> None:
        """In diffusers' layout: float16, and float8 (e4m3) for the U-Net's matrices but the first and the last."""
        super().export(folder)
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        stored = {
            name: tensor if tensor.ndim < 2 or name in ENDS else tensor.to(torch.float8_e4m3fn)
            for name, tensor in load_file(path).items()
        }
        save_file(stored, path, metadata={"format": "pt"})

    def preview(self, path: Path) -> None:
        """Scenes that were not trained on, with their holes above and filled below."""
        config, rng = self._config, np.random.default_rng(3)
        emoji, renderer, cut = load(config.emoji), Renderer(config.size, config.font), holes(config.size)
        scenes = [draw(rng, emoji, held_out=True) for _ in range(PREVIEW_COLUMNS)]
        pictures = [renderer(scene) for scene in scenes]
        masks = [cut(scene, rng) for scene in scenes]
        pipeline = self.pipeline()
        filled = [
            pipeline(
                scene.caption,
                image=torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1,
                mask_image=torch.from_numpy(mask)[None, None],
                height=config.size,
                width=config.size,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
            ).images[0]
            for scene, picture, mask in zip(scenes, pictures, masks, strict=True)
        ]
        cut_out = [
            np.where(mask[..., None] > 0, 128, p).astype(np.uint8)
            for p, mask in zip(pictures, masks, strict=True)
        ]
        painted = [(picture * 255).round().astype(np.uint8) for picture in filled]
        grid([*cut_out, *painted], PREVIEW_COLUMNS).save(path)
