"""Stage one: the autoencoder, pictures [3, H, W] <-> latents [4, H/4, W/4] (Rombach et al. 2022, arXiv:2112.10752)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from render import Renderer, grid, pixel_art
from world import Emoji, draw

SPREAD = 0.05
"""Standard deviation of the posterior. Fixed: a learned one opens up before the decoder has learned to read latents."""
SLACK = 0.25
"""Largest standard deviation of the noise that the decoder learns to forgive, in latents of unit variance."""
PIXEL_ART = 0.125
"""The part of the pictures in the style of the LoRA, which brings no decoder of its own."""
THUMBNAIL_WEIGHT, SIZE_WEIGHT = 0.02, 1e-4


def build_autoencoder(channels: tuple[int, ...], size: int) -> AutoencoderKL:
    """An untrained autoencoder of factor ``2 ** (len(channels) - 1)`` for pictures of `size` pixels."""
    levels = len(channels)
    model = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=8,  # several channels a group: one alone is instance norm, which forgets flat colours
        mid_block_add_attention=False,
        sample_size=size,
    )
    # The second half of the moments is the logarithm of the variance; it is a constant here.
    half = model.config.latent_channels
    with torch.no_grad():
        model.quant_conv.weight[half:] = 0
        model.quant_conv.bias[half:] = 2 * float(np.log(SPREAD))
    return model


class AutoencoderTask:
    """Reconstruction of fresh random scenes, L1 + L2, from latents with a little noise.

    Three of the latent channels are drawn towards a thumbnail of the picture: what the U-Net has to paint is then
    nearly a small picture, and backgrounds are constants in it. The decoder fills in what is sharp.
    """

    name = "autoencoder"

    def __init__(self, model: AutoencoderKL, renderer: Renderer, emoji: tuple[Emoji, ...], rows: int):
        self.modules = nn.ModuleDict({"vae": model})
        self._model, self._renderer, self._emoji, self._rows = model, renderer, emoji, rows
        self._factor = 2 ** (len(model.config.block_out_channels) - 1)

    def _pictures(self, rng: np.random.Generator, rows: int, held_out: bool = False) -> Tensor:
        drawn = [self._renderer(draw(rng, self._emoji, held_out), rng) for _ in range(rows)]
        styled = [pixel_art(picture) if rng.random() < PIXEL_ART else picture for picture in drawn]
        return to_signed(np.stack(styled)).to(self._model.device)

    def loss(self, rng: torch.Generator) -> Tensor:
        """Of the pixels, with a little of the latents'."""
        pictures = self._pictures(np.random.default_rng(rng.initial_seed()), self._rows)
        means = self._means(pictures)
        latents = means + SPREAD * torch.randn(means.shape, generator=rng).to(means)
        thumbnails = F.avg_pool2d(pictures, self._factor)
        return (
            _distance(self._model.decode(latents).sample.float(), pictures)
            + THUMBNAIL_WEIGHT * F.mse_loss(means[:, :3].float(), thumbnails)
            + SIZE_WEIGHT * means.float().square().mean()
        )

    def _means(self, pictures: Tensor) -> Tensor:
        return self._model.quant_conv(self._model.encoder(pictures))[:, : self._model.config.latent_channels]

    @torch.no_grad()
    def normalise(self, rows: int = 512) -> None:
        """Bring every latent channel to mean 0 and variance 1, by the convolutions on both sides of the latents.

        The pictures stay the same. A single scaling factor would leave details four times as large as thumbnails.
        """
        pictures = self._pictures(np.random.default_rng(0), rows)
        latents = torch.cat([self._means(part) for part in pictures.split(64)])
        mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        before, after, half = self._model.quant_conv, self._model.post_quant_conv, len(mean)
        before.weight[:half] /= std[:, None, None, None]
        before.bias[:half] = (before.bias[:half] - mean) / std
        before.bias[half:] -= 2 * std.log()
        after.bias += after.weight[:, :, 0, 0] @ mean
        after.weight *= std[:, None, None]
        self._model.register_to_config(scaling_factor=1.0)

    def preview(self, path: Path) -> None:
        """Held-out scenes above, what comes back below."""
        pictures = self._pictures(np.random.default_rng(1), 16, held_out=True)
        decoded = self._model.decode(self._model.encode(pictures).latent_dist.mode()).sample
        grid([*to_bytes(pictures), *to_bytes(decoded)], 16).save(path)
        quality = psnr(to_bytes(decoded), to_bytes(pictures))
        print(f"\n{path.name}: {quality:.1f} dB on held-out scenes", flush=True)


class DecoderTask(AutoencoderTask):
    """More of the same for the decoder alone: the latents, and with them the U-Net's lesson, stay as they are.

    It sees more noise in them than there is, and so learns to forgive a U-Net that is not quite right.
    """

    name = "decoder"

    def __init__(self, model: AutoencoderKL, *args: Any):
        super().__init__(model, *args)
        self.modules = nn.ModuleDict({"decoder": model.decoder, "post_quant_conv": model.post_quant_conv})
        self.modules.requires_grad_(True)

    def loss(self, rng: torch.Generator) -> Tensor:
        """Of the pixels."""
        pictures = self._pictures(np.random.default_rng(rng.initial_seed()), self._rows)
        with torch.no_grad():
            means = self._model.encode(pictures).latent_dist.mean
            slack = SLACK * torch.rand(len(means), 1, 1, 1, generator=rng)
            latents = means + (slack * torch.randn(means.shape, generator=rng)).to(means)
        return _distance(self._model.decode(latents).sample.float(), pictures)


def _distance(decoded: Tensor, pictures: Tensor) -> Tensor:
    return F.l1_loss(decoded, pictures) + 2 * F.mse_loss(decoded, pictures)


def to_signed(pictures: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in -1 .. 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def to_bytes(pictures: Tensor) -> np.ndarray:
    """The way back, clipped and rounded."""
    scaled = pictures.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).numpy()


def psnr(pictures: np.ndarray, truth: np.ndarray) -> float:
    """Of pixels 0 .. 255, in dB, of the mean squared error over all of them."""
    return float(-10 * np.log10(np.square((pictures - truth.astype(np.float64)) / 255).mean()))
