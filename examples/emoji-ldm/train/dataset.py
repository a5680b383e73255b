"""Scenes as the U-Net learns from them: latents and captions, encoded once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoencoder import to_signed
from config import Config
from loop import Workers, save_whole
from model import Model
from render import Renderer
from world import Scene, draw, load

BATCH = 64

Hole = Callable[[Scene, np.random.Generator], np.ndarray]
"""Where a picture of a scene is missing: float32 [H, W] of 0 and 1."""


@dataclass(frozen=True)
class Examples:
    """One worker's share of the training scenes.

    Attributes:
        latents: float16 [N, 4, h, w], times the scaling factor: of unit variance.
        ids: int64 [N, 16], tokens of the captions.
        masks: float16 [N, 1, h, w], 1 where the picture is missing; None where nothing is.
        around: float16 [N, 4, h, w], latents of the picture with a grey hole; None where nothing is missing.
    """

    latents: Tensor
    ids: Tensor
    masks: Tensor | None = None
    around: Tensor | None = None


@torch.no_grad()
def encode_scenes(
    name: str,
    run: Path,
    config: Config,
    workers: Workers,
    model: Model,
    *,
    style: Callable[[np.ndarray], np.ndarray] = lambda picture: picture,
    hole: Hole | None = None,
) -> Examples:
    """Draws and encodes ``config.scenes`` scenes, or takes what an earlier run has left in ``RUN/NAME-*.pt``.

    Args:
        style: What is done to each picture, uint8 [H, W, 3].
        hole: What is cut out of each, for inpainting.
    """
    path = run / f"{name}-{workers.rank}-of-{workers.count}.pt"
    if not path.exists():
        renderer, emoji = Renderer(config.size, config.font), load(config.emoji)
        rng = np.random.default_rng(workers.rank)
        parts: list[tuple[Tensor, ...]] = []
        for _ in range(config.scenes // workers.count // BATCH):
            scenes = [draw(rng, emoji) for _ in range(BATCH)]
            pictures = to_signed(np.stack([style(renderer(scene, rng)) for scene in scenes]))
            part = _encode(model, pictures), model.tokenize([scene.caption for scene in scenes])
            if hole is not None:
                masks = torch.from_numpy(np.stack([hole(scene, rng) for scene in scenes]))[:, None]
                around = _encode(model, pictures * (1 - masks))
                part = (*part, masks[..., :: config.factor, :: config.factor].half(), around)
            parts.append(part)
        save_whole([torch.cat(column) for column in zip(*parts, strict=True)], path)
    return Examples(*torch.load(path))


def _encode(model: Model, pictures: Tensor) -> Tensor:
    device = model.vae.device
    with torch.autocast(device.type, torch.bfloat16):
        latents = model.vae.encode(pictures.to(device)).latent_dist.mode()
    return (latents.float() * model.vae.config.scaling_factor).half().cpu()
