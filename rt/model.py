"""What a checkpoint is: its components and the few facts that running it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from rt.decode import decode


class Component(str, Enum):
    """A network of the model, or the part of one that is compiled on its own.

    Named as in diffusers' `model_index.json`; encoder and decoder are halves of `vae`, and the U-Net comes in parts:
    what depends on the timestep, what depends on the text states, the step, and the step that reuses deep features.
    """

    TEXT_ENCODER = "text_encoder"
    TEXT_ENCODER_2 = "text_encoder_2"
    UNET_TIME = "unet_time"
    UNET_CONTEXT = "unet_context"
    UNET = "unet"
    UNET_SHALLOW = "unet_shallow"
    VAE_ENCODER = "vae_encoder"
    VAE_DECODER = "vae_decoder"


class Family(str, Enum):
    """Which conditioning the U-Net wants: one CLIP-L (SD 1.x), one OpenCLIP-H (2.x), two and sizes (XL)."""

    SD1 = "sd1"
    SD2 = "sd2"
    SDXL = "sdxl"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The facts of one checkpoint, read from its configs, never from its name.

    Attributes:
        family: What the U-Net is conditioned on.
        latent_channels: Channels of the latents, 4 in every Stable Diffusion.
        vae_scale_factor: Pixels per latent pixel along one side (8 in SD; a demo model may have 4).
        sample_size: Side of the latents the model was trained on, or their height and width; the default picture has
            `vae_scale_factor` times as many pixels.
        scaling_factor: What latents are multiplied by after encoding, and divided by before decoding.
        text_encoders: In the order in which their hidden states are concatenated.
        max_tokens: Length of the token sequence, with its start and end.
        context_size: Channels of the text states that the U-Net attends to.
        pooled_size: Channels of the pooled text embedding (SDXL), or None.
        zero_negative: Whether a missing negative prompt means zero states rather than those of "" (SDXL).
        scheduler: The checkpoint's `scheduler_config.json` with the class that `model_index.json` names, and what
            diffusers' pipeline repairs in old ones (`pipe.scheduler.config`).
        inpainting: Whether the U-Net also sees a mask and the latents of the picture around it.
    """

    family: Family
    latent_channels: int
    vae_scale_factor: int
    sample_size: int | list[int]
    scaling_factor: float
    text_encoders: tuple[Component, ...]
    max_tokens: int
    context_size: int
    pooled_size: int | None
    zero_negative: bool
    scheduler: Mapping[str, Any]
    inpainting: bool = False

    @property
    def default_guidance_scale(self) -> float:
        """That of diffusers' pipeline for such a model: 5 for XL, and 7.5 for the others, XL's inpainting included."""
        return 5.0 if self.family is Family.SDXL and not self.inpainting else 7.5

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, rows and columns of the latents of a picture of `height` x `width` pixels."""
        return (self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """From what `to_json` gave; raises as `decode`."""
        return decode(cls, data, "model")
