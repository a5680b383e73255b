"""What stays of a picture and what is painted anew, as an inpainting U-Net wants to see it.

Such a U-Net (Rombach et al. 2022, https://arxiv.org/abs/2112.10752; 9 input channels in Stable Diffusion) reads at
every step the latents, the mask, and the latents of the picture with a grey hole in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rt.errors import ConfigError
from rt.noise import Noise

if TYPE_CHECKING:
    from PIL import Image

Float32 = NDArray[np.float32]
Picture = Any
"""A PIL image, uint8 (H, W, 3) or (H, W), or the path of a file, which is turned upright if it says how."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Inpainting:
    """The mask and the rest of the picture, in latents.

    Attributes:
        mask: (1, h, w), 1 where the picture is painted anew, else 0.
        mean: Of the latents (C, h, w) of the picture around the mask, as the VAE's encoder has them.
        std: Of the same.
    """

    mask: Float32
    mean: Float32
    std: Float32

    def around(self, noise: Noise) -> Float32:
        """Latents (C, h, w) of the rest of the picture: the encoder gives a distribution, and this is one of it."""
        drawn: Float32 = self.mean + self.std * noise.randn(self.mean.shape)
        return drawn


def cut_out(image: Picture, mask: Picture, height: int, width: int) -> tuple[Float32, Float32]:
    """The picture with a grey hole, (H, W, 3) in [-1, 1], and the hole, (H, W) of 0 and 1.

    Both are resized to the asked size (Lanczos); of the mask, what is brighter than half is painted anew.

    Raises:
        ConfigError: One of the two is no picture.
    """
    size = (width, height)
    pixels = np.asarray(_resize(_open(image, "image").convert("RGB"), size), np.float32)
    levels = np.asarray(_resize(_open(mask, "mask_image"), size).convert("L"), np.float32)
    hole = np.where(levels / np.float32(255) >= 0.5, np.float32(1), np.float32(0))
    return (pixels / np.float32(255) * 2 - 1) * (1 - hole)[..., None], hole


def _open(picture: Picture, name: str) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if isinstance(picture, str | Path):
            with Image.open(picture) as opened:
                return ImageOps.exif_transpose(opened)
        if isinstance(picture, Image.Image):
            return picture
        pixels = np.asarray(picture)
        if pixels.dtype != np.uint8:
            raise TypeError
        return Image.fromarray(pixels)
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise ConfigError(
            f"{name} {picture} is no picture of a usual kind and size: expected PNG, JPEG or WebP"
        ) from None
    except OSError as error:
        raise ConfigError(f"{name} {picture} cannot be read: {error.strerror or error}") from None
    except (TypeError, ValueError):
        array = isinstance(picture, np.ndarray)
        kind = f"{picture.dtype} {picture.shape}" if array else type(picture).__name__
        raise ConfigError(
            f"{name} is {kind}: expected a PIL image, uint8 (height, width, 3) or (height, width), or a path"
        ) from None


def _resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
