"""diffusers as its documentation shows it: `StableDiffusionPipeline` in fp32, or in bf16 with channels last.

https://huggingface.co/docs/diffusers/optimization/fp16, https://huggingface.co/docs/diffusers/optimization/memory
"""

from __future__ import annotations

import time
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from rt.bench.peers.peer import (
    GUIDANCE_SCALE,
    PICTURE,
    STEP,
    TEXT,
    UNET,
    VAE,
    Float32,
    Inputs,
    Outcome,
    Setting,
    timed,
)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Eager:
    """A pipeline of diffusers and its parts."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.dtype: torch.dtype = pipeline.unet.dtype
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def text(self, inputs: Inputs) -> Outcome:
        """See `Peer`."""
        tokens = torch.from_numpy(inputs.tokens)
        output, seconds = timed(TEXT, lambda: self.pipeline.text_encoder(tokens)[0])
        return Outcome(output=_float32(output), seconds=seconds)

    @torch.no_grad()
    def unet(self, inputs: Inputs) -> Outcome:
        """See `Peer`."""
        latents = self._tensor(inputs.latents).repeat(2, 1, 1, 1)
        timestep, context = torch.tensor(inputs.timestep), self._tensor(inputs.context)
        call = lambda: self.pipeline.unet(latents, timestep, encoder_hidden_states=context, return_dict=False)  # noqa: E731
        output, seconds = timed(UNET, call)
        return Outcome(output=_float32(output[0][1]), seconds=seconds)

    @torch.no_grad()
    def vae(self, inputs: Inputs) -> Outcome:
        """See `Peer`."""
        vae = self.pipeline.vae
        latents = self._tensor(inputs.latents) / vae.config.scaling_factor
        output, seconds = timed(VAE, lambda: vae.decode(latents, return_dict=False))
        return Outcome(output=_float32(output[0][0].permute(1, 2, 0)), seconds=seconds)

    def picture(self, inputs: Inputs) -> Outcome:
        """See `Peer`."""
        ends: list[float] = []

        def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            ends.append(time.perf_counter())
            return tensors

        output, seconds = timed(
            PICTURE,
            lambda: self.pipeline(
                inputs.prompt,
                num_inference_steps=inputs.steps,
                guidance_scale=GUIDANCE_SCALE,
                latents=self._tensor(inputs.noise),
                output_type="np",
                callback_on_step_end=on_step_end,
            ),
        )
        if len(ends) > 1:  # before the end of the first one lies the text, too
            seconds[STEP] = (ends[-1] - ends[0]) / (len(ends) - 1)
        return Outcome(output=output.images[0], seconds=seconds)

    def _tensor(self, array: Float32) -> Tensor:
        return torch.from_numpy(array).to(self.dtype)


def load(setting: Setting) -> Eager:
    """Options: `dtype`, fp32 or bf16; bf16 comes with channels last, without which it is slower."""
    torch.set_num_threads(setting.threads)
    dtype = _DTYPES[setting.options["dtype"]]
    pipeline = StableDiffusionPipeline.from_pretrained(
        setting.checkpoint, torch_dtype=dtype, safety_checker=None
    )
    if dtype is torch.bfloat16:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    return Eager(pipeline)


def _float32(tensor: Tensor) -> Float32:
    array: Float32 = tensor.float().contiguous().numpy()
    return array
