"""One component of a checkpoint to one `Program`: static shapes, plain tensors in and out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from rt.export.program import Program, trace_program
from rt.export.unet import trace_unet
from rt.model import Component, Family, ModelSpec
from rt.shapes import ShapeProfile


class TextEncoder(nn.Module):
    """Tokens (1, T) int64 → states (K, T, C), and pooled (1, P) where the model has a projection.

    Row k leaves out the last k layers, diffusers' `clip_skip`; row 0 is what a model was made for: of SD 1.x and 2.x
    the last layer, of SDXL the last but one. Its norm, which follows the last layer, is applied to every row of SD 1.x
    and 2.x and to none of SDXL
    (https://huggingface.co/docs/diffusers/api/pipelines/stable_diffusion/text2img and …/stable_diffusion_xl).
    The last row is the embeddings of the tokens.
    """

    def __init__(self, encoder: nn.Module, *, penultimate: bool) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.penultimate = penultimate

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        output = self.encoder(tokens, output_hidden_states=True)
        *earlier, last = output.hidden_states
        if self.penultimate:
            rows = earlier[::-1]
        else:  # each by itself, so that the first is computed as if it were alone
            norm = self.encoder.final_layer_norm
            rows = [norm(last), *(norm(states) for states in earlier[::-1])]
        states = torch.cat(rows)
        return (states, output.text_embeds) if "text_embeds" in output else (states,)


class VAEEncoder(nn.Module):
    """Image (1, H, W, 3) in [-1, 1] → mean and std (1, C, h, w) of its latents, scaled as the U-Net has them."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        distribution = self.vae.encode(image.permute(0, 3, 1, 2), return_dict=False)[0]
        scale = self.vae.config.scaling_factor
        return distribution.mean * scale, distribution.std * scale


class VAEDecoder(nn.Module):
    """Latents (1, C, h, w) → image (1, H, W, 3), in [-1, 1] up to overshoot."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        """See the class."""
        config = self.vae.config
        return (self.vae.decode(latents / config.scaling_factor, return_dict=False)[0].permute(0, 2, 3, 1),)


def trace(
    component: Component,
    module: nn.Module,
    spec: ModelSpec,
    profiles: tuple[ShapeProfile, ...],
    text: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    step_cache: bool = False,
) -> Iterator[Program]:
    """Every program that `component` needs for the profiles, one at a time.

    Text does not depend on a shape; the VAE takes one picture at a time, so only its size matters;
    the U-Net has one program a profile with guidance and one without, and one each for timestep and text.

    Args:
        component: What to trace.
        module: Its network.
        spec: The facts of the model.
        profiles: The shapes.
        text: What the text encoders gave, `context` (1, T, D) and `pooled` (1, P), for example inputs of the
            U-Net that are as large as real ones; normal noise where left out.
        step_cache: Whether each step of the U-Net gets a shallow one beside it.
    """
    if component in spec.text_encoders:
        encoder = TextEncoder(module, penultimate=spec.family is Family.SDXL)
        outputs = ("states", "pooled") if component is Component.TEXT_ENCODER_2 else ("states",)
        yield trace_program(component.value, component, None, encoder, _text_inputs(module, spec), outputs)
    elif component is Component.UNET:
        yield from trace_unet(module, spec, profiles, text, step_cache=step_cache)
    else:
        for profile in dict.fromkeys(ShapeProfile(p.height, p.width) for p in profiles):
            name = f"{component.value}-{profile.height}x{profile.width}"
            if component is Component.VAE_ENCODER:
                inputs = {"image": _randn((1, profile.height, profile.width, 3)).clamp(-1, 1)}
                yield trace_program(name, component, profile, VAEEncoder(module), inputs, ("mean", "std"))
            else:
                inputs = {"latents": _randn((1, *spec.latent_shape(profile.height, profile.width)))}
                yield trace_program(name, component, profile, VAEDecoder(module), inputs, ("image",))


def _text_inputs(encoder: Any, spec: ModelSpec) -> dict[str, Tensor]:
    config = encoder.config
    tokens = torch.randint(
        0, config.vocab_size, (1, spec.max_tokens), generator=torch.Generator().manual_seed(0)
    )
    # The pooled embedding is read at the end-of-text token, so a sequence without one is not a prompt.
    tokens[0, spec.max_tokens // 2 :] = config.eos_token_id
    return {"tokens": tokens}


def _randn(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
