"""What stays of a picture and what is painted anew, as an inpainting U-Net wants to see it.

Such a U-Net (Rombach et al. 2022, https://arxiv.org/abs/2112.10752; 9 input channels in Stable Diffusion) reads at
every step the latents, the mask, and the latents of the picture with a grey hole in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rt.errors import ConfigError
from rt.noise import Noise
from rt.picture import Picture, levels

Float32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Inpainting:
    """The mask and the rest of the picture, in latents.

    Attributes:
        mask: (1, h, w), 1 where the picture is painted anew, else 0.
        around: Latents (C, h, w) of the picture around the mask.
    """

    mask: Float32
    around: Float32

    @classmethod
    def drawn(cls, mask: Float32, mean: Float32, std: Float32, noise: Noise) -> Inpainting:
        """The encoder gives a distribution, `mean` and `std` (C, h, w), of which this takes one."""
        return cls(mask=mask, around=mean + std * noise.randn(mean.shape))


def cut_out(image: Picture, mask: Picture, height: int, width: int) -> tuple[Float32, Float32]:
    """The picture with a grey hole, (H, W, 3) in [-1, 1], and the hole, (H, W) of 0 and 1.

    Both are resized to the asked size (Lanczos); of the mask, what is brighter than half is painted anew.

    Raises:
        ConfigError: One of the two is no picture, see `rt.picture.levels`.
    """
    pixels = levels(image, "image", (width, height), "RGB")
    grey = levels(mask, "mask_image", (width, height), "L")
    if 0 < grey.max() <= np.float32(1 / 255):
        raise ConfigError(
            "mask_image has no level above 1 of 255, so that nothing would be painted: give 0 and 255, or bool"
        )
    hole = np.where(grey >= 0.5, np.float32(1), np.float32(0))
    return (pixels * 2 - 1) * (1 - hole)[..., None], hole
