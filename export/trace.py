"""One component of a checkpoint to one `Program`: static shapes, plain tensors in and out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from rt.export.passes.hoist import hoist
from rt.export.passes.simplify import simplify
from rt.model import Component, Family, ModelSpec
from rt.shapes import ShapeProfile

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A traced graph, the IR that passes rewrite, with example inputs that are also its test inputs.

    Attributes:
        name: Unique in a build, such as `unet-1x512x512-guided`.
        component: What was traced.
        profile: The shape it is for, None for text.
        guided: U-Net only: whether the batch is repeated inside for classifier-free guidance.
        module: The fx graph with its weights; parameters are shared with the component.
        inputs: Name to example, in the order of the graph.
        outputs: Names in the order of the graph.
    """

    name: str
    component: Component
    profile: ShapeProfile | None
    guided: bool
    module: fx.GraphModule
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]


class TextEncoder(nn.Module):
    """Tokens (1, T) int64 → states (1, T, C), and pooled (1, P) where the model has a projection.

    SD 1.x and 2.x read the last layer after its norm, SDXL the one before it without
    (https://huggingface.co/docs/diffusers/api/pipelines/stable_diffusion/stable_diffusion_xl).
    """

    def __init__(self, encoder: nn.Module, *, penultimate: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.penultimate = penultimate

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        output = self.encoder(tokens, output_hidden_states=self.penultimate)
        states = output.hidden_states[-2] if self.penultimate else output.last_hidden_state
        return (states, output.text_embeds) if "text_embeds" in output else (states,)


class UNet(nn.Module):
    """Latents (B, C, h, w), timestep (R,) and context (R, T, D) → prediction (R, C, h, w).

    With guidance R = 2B: the first B rows are unconditional, the last B conditional, and the latents are
    repeated in here, so that a pass can move the repeat to where the halves first differ.
    SDXL also takes pooled (R, P) and sizes (R, 6); an inpainting model mask (B, 1, h, w) and around (B, C, h, w), the
    latents of what the mask leaves.
    """

    def __init__(self, unet: nn.Module, *, guided: bool) -> None:
        super().__init__()
        self.unet = unet
        self.repeat = 2 if guided else 1

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
        mask: Tensor | None = None,
        around: Tensor | None = None,
    ) -> tuple[Tensor]:
        """See the class."""
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
        if mask is not None and around is not None:
            latents = torch.cat([latents, mask, around], dim=1)
        latents = torch.cat([latents] * self.repeat)
        prediction: tuple[Tensor] = self.unet(
            latents, timestep, context, added_cond_kwargs=added, return_dict=False
        )
        return prediction


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
) -> Iterator[Program]:
    """Every program that `component` needs for the profiles, one at a time.

    Text does not depend on a shape; the VAE takes one picture at a time, so only its size matters;
    the U-Net has one program a profile with guidance and one without, and one for the timestep.

    Args:
        component: What to trace.
        module: Its network.
        spec: The facts of the model.
        profiles: The shapes.
        text: What the text encoders gave, `context` (1, T, D) and `pooled` (1, P), for example inputs of the
            U-Net that are as large as real ones; normal noise where left out.
    """
    if component in spec.text_encoders:
        encoder = TextEncoder(module, penultimate=spec.family is Family.SDXL)
        outputs = ("states", "pooled") if component is Component.TEXT_ENCODER_2 else ("states",)
        yield _trace(component.value, component, None, False, encoder, _text_inputs(module, spec), outputs)
    elif component is Component.UNET:
        yield from _trace_unet(module, spec, profiles, text)
    else:
        for profile in dict.fromkeys(ShapeProfile(p.height, p.width) for p in profiles):
            name = f"{component.value}-{profile.height}x{profile.width}"
            if component is Component.VAE_ENCODER:
                inputs = {"image": _randn((1, profile.height, profile.width, 3)).clamp(-1, 1)}
                yield _trace(name, component, profile, False, VAEEncoder(module), inputs, ("mean", "std"))
            else:
                inputs = {"latents": _randn((1, *spec.latent_shape(profile.height, profile.width)))}
                yield _trace(name, component, profile, False, VAEDecoder(module), inputs, ("image",))


def _trace_unet(
    module: nn.Module, spec: ModelSpec, profiles: tuple[ShapeProfile, ...], text: Mapping[str, Tensor]
) -> Iterator[Program]:
    """The part that depends on the timestep alone, once, then the step for each profile."""
    for index, (profile, guided) in enumerate(itertools.product(profiles, (True, False))):
        name = f"{Component.UNET.value}-{profile.batch_size}x{profile.height}x{profile.width}"
        name += "-guided" if guided else ""
        inputs = _unet_inputs(spec, profile, guided, text)
        whole = _trace(
            name, Component.UNET, profile, guided, UNet(module, guided=guided), inputs, ("prediction",)
        )
        early, late = hoist(whole.module, "timestep", "time")
        timestep = inputs["timestep"]
        if index == 0:
            yield Program(
                name=Component.UNET_TIME.value,
                component=Component.UNET_TIME,
                profile=None,
                guided=False,
                module=early,
                inputs={"timestep": timestep},
                outputs=("time",),
            )
        with torch.no_grad():
            time = early(timestep)[0]
        step_inputs = {("time" if key == "timestep" else key): value for key, value in inputs.items()}
        yield replace(whole, module=late, inputs={**step_inputs, "time": time})


def _trace(
    name: str,
    component: Component,
    profile: ShapeProfile | None,
    guided: bool,
    wrapper: nn.Module,
    inputs: dict[str, Tensor],
    outputs: tuple[str, ...],
) -> Program:
    with torch.no_grad():
        exported = torch.export.export(wrapper.eval(), (), inputs, strict=False)
    module = simplify(exported.module(check_guards=False))
    return Program(
        name=name,
        component=component,
        profile=profile,
        guided=guided,
        module=module,
        inputs=inputs,
        outputs=outputs,
    )


def _text_inputs(encoder: Any, spec: ModelSpec) -> dict[str, Tensor]:
    config = encoder.config
    tokens = torch.randint(0, config.vocab_size, (1, spec.max_tokens), generator=_generator())
    # The pooled embedding is read at the end-of-text token, so a sequence without one is not a prompt.
    tokens[0, spec.max_tokens // 2 :] = config.eos_token_id
    return {"tokens": tokens}


def _unet_inputs(
    spec: ModelSpec, profile: ShapeProfile, guided: bool, text: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    rows = profile.batch_size * (2 if guided else 1)
    generator = _generator()
    inputs = {
        "latents": _randn((profile.batch_size, *spec.latent_shape(profile.height, profile.width)), generator),
        "timestep": torch.randint(1, TRAIN_TIMESTEPS, (rows,), generator=generator).float(),
        "context": _rows(text, "context", rows, (spec.max_tokens, spec.context_size), generator),
    }
    if spec.pooled_size is not None:
        size = [profile.height, profile.width]
        inputs["pooled"] = _rows(text, "pooled", rows, (spec.pooled_size,), generator)
        inputs["sizes"] = torch.tensor([[*size, 0, 0, *size]] * rows, dtype=torch.float32)
    if spec.inpainting:
        shape = spec.latent_shape(profile.height, profile.width)
        inputs["mask"] = (_randn((profile.batch_size, 1, *shape[1:]), generator) > 0).float()
        inputs["around"] = _randn((profile.batch_size, *shape), generator)
    return inputs


def _rows(
    text: Mapping[str, Tensor], name: str, rows: int, shape: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    """(rows, *shape): the given text, rolled by a place a row so that no two rows are alike."""
    if name not in text:
        return _randn((rows, *shape), generator)
    return torch.cat([text[name].roll(row, dims=1) for row in range(rows)])


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _randn(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    return torch.randn(shape, generator=generator or _generator())
