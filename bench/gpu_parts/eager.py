"""diffusers as its documentation shows it for a GPU: fp16, channels last, PyTorch's attention, convolutions tried out.

https://huggingface.co/docs/diffusers/optimization/fp16, https://huggingface.co/docs/diffusers/optimization/memory
"""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rt.bench.gpu_parts.model import Model
from rt.bench.gpu_parts.place import trying_convolutions
from rt.bench.gpu_parts.settings import DIFFUSERS
from rt.export.trace import TextEncoder
from rt.model import Component, Family


class Eager:
    """Text encoders, U-Net and autoencoder of one model in diffusers' pipeline; see `Peer`.

    Args:
        model: What to load.
        dtype: Of its weights; that of the model when left out.
    """

    name = DIFFUSERS

    def __init__(self, model: Model, dtype: torch.dtype | None = None) -> None:
        self.model = model
        self._dtype = dtype or model.dtype
        self._xl = model.checkpoint.spec.family is Family.SDXL
        self._text: list[Any] = [
            TextEncoder(self._load(encoder), penultimate=self._xl)
            for encoder in model.checkpoint.spec.text_encoders
        ]
        self.pipeline = self._pipeline()
        inputs = model.inputs
        rows = len(inputs.context)
        self._latents = inputs.latents.to(self._dtype).repeat(rows, 1, 1, 1)
        self._latents = self._latents.contiguous(memory_format=torch.channels_last)
        # Of the type that the loop gives, float32 for some schedulers: a compiler would compile once for each.
        self.pipeline.scheduler.set_timesteps(1)
        kind = self.pipeline.scheduler.timesteps.dtype
        self._timestep = torch.tensor(inputs.timestep, dtype=kind, device=model.place.device)
        self._context = inputs.context.to(self._dtype)
        self._added = None
        if inputs.pooled is not None and inputs.sizes is not None:
            self._added = {
                "text_embeds": inputs.pooled.to(self._dtype),
                "time_ids": inputs.sizes.to(self._dtype),
            }

    @torch.no_grad()
    @trying_convolutions()
    def unet(self) -> Tensor:
        """See `Peer`."""
        self._before()
        output: Tensor = self.pipeline.unet(
            self._latents,
            self._timestep,
            encoder_hidden_states=self._context,
            added_cond_kwargs=self._added,
            return_dict=False,
        )[0]
        return output

    @torch.no_grad()
    @trying_convolutions()
    def vae(self) -> Tensor:
        """See `Peer`."""
        self._before()
        vae = self.pipeline.vae
        output: Tensor = vae.decode(self._latents[:1] / vae.config.scaling_factor, return_dict=False)[0]
        return output

    @torch.no_grad()
    @trying_convolutions()
    def picture(self, steps: int) -> NDArray[np.uint8]:
        """See `Peer`."""
        tokens = self.model.inputs.tokens.values()
        # Copies, because what a replayed graph gave is overwritten when the next one runs.
        given = [
            [output.clone() for output in encoder(each)]
            for encoder, each in zip(self._text, tokens, strict=True)
        ]
        # Of the states at each depth, the first are what the model was made for.
        states = torch.cat([each[0][: len(self._context)] for each in given], dim=-1)
        text = {"prompt_embeds": states[-1:]}
        if self.model.setting.guided:
            text["negative_prompt_embeds"] = states[:1]
        if self._xl:
            text["pooled_prompt_embeds"] = given[-1][1][-1:]
            if self.model.setting.guided:
                text["negative_pooled_prompt_embeds"] = given[-1][1][:1]
        images = self.pipeline(
            **text,
            height=self.model.setting.side,
            width=self.model.setting.side,
            num_inference_steps=steps,
            guidance_scale=self.model.guidance_scale,
            latents=self._latents[:1].clone(),
        ).images
        return np.asarray(images[0])

    def _before(self) -> None:
        """Called before each evaluation of a network."""

    def _load(self, component: Component) -> Any:
        module: Any = self.model.checkpoint.load(component).to(self.model.place.device, self._dtype)
        if component in (Component.UNET, Component.VAE_DECODER):
            module.to(memory_format=torch.channels_last)
        return module

    def _pipeline(self) -> Any:
        """Without tokenizers: it is given text states."""
        vae = self._load(Component.VAE_DECODER)
        vae.register_to_config(force_upcast=False)  # or XL's would decode in fp32, at a third of the speed
        config = self.model.checkpoint.configs["scheduler"]
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        parts = {
            "vae": vae,
            "unet": self._load(Component.UNET),
            "scheduler": scheduler,
            "text_encoder": None,
            "tokenizer": None,
        }
        if self._xl:
            pipeline = diffusers.StableDiffusionXLPipeline(
                **parts, text_encoder_2=None, tokenizer_2=None, add_watermarker=False
            )
        else:
            pipeline = diffusers.StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
