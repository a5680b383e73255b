"""The loop around three compiled graphs, as whoever calls an engine directly writes it, with diffusers' scheduler."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from numpy.typing import NDArray
from transformers import CLIPTokenizer

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
    timed,
)

Graph = Callable[[Mapping[str, NDArray[Any]]], Float32]
"""Inputs by name → the only output."""


class ByHand:
    """A peer of three graphs with the inputs of `onnx_graphs`."""

    def __init__(self, checkpoint: Path, graphs: Mapping[str, Graph]) -> None:
        self._text, self._unet, self._decoder = (
            graphs[name] for name in ("text_encoder", "unet", "vae_decoder")
        )
        self._tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
        self._scheduler = DDIMScheduler.from_pretrained(checkpoint / "scheduler", clip_sample=False)
        self._scaling_factor = AutoencoderKL.load_config(checkpoint / "vae")["scaling_factor"]

    def text(self, inputs: Inputs) -> Outcome:
        """See `Peer`."""
        output, seconds = timed(TEXT, lambda: self._text({"input_ids": inputs.tokens}))
        return Outcome(output=output.copy(), seconds=seconds)

    def unet(self, inputs: Inputs) -> Outcome:
        """See `Peer`."""
        arrays = {
            "sample": np.repeat(inputs.latents, 2, axis=0),
            "timestep": np.array([inputs.timestep]),
            "encoder_hidden_states": inputs.context,
        }
        output, seconds = timed(UNET, lambda: self._unet(arrays))
        return Outcome(output=output[1].copy(), seconds=seconds)

    def vae(self, inputs: Inputs) -> Outcome:
        """See `Peer`."""
        latents = inputs.latents / np.float32(self._scaling_factor)
        output, seconds = timed(VAE, lambda: self._decoder({"latent_sample": latents}))
        return Outcome(output=output[0].transpose(1, 2, 0).copy(), seconds=seconds)

    def picture(self, inputs: Inputs) -> Outcome:
        """See `Peer`."""
        (image, step_s), seconds = timed(PICTURE, lambda: self._draw(inputs))
        return Outcome(output=image, seconds={**seconds, STEP: step_s})

    def _draw(self, inputs: Inputs) -> tuple[Float32, float]:
        """The image and the mean seconds of a step."""
        context = np.concatenate([self._encode(""), self._encode(inputs.prompt)])
        self._scheduler.set_timesteps(inputs.steps)
        latents = torch.from_numpy(inputs.noise) * self._scheduler.init_noise_sigma
        started = time.perf_counter()
        for timestep in self._scheduler.timesteps:
            arrays = {
                "sample": latents.repeat(2, 1, 1, 1).numpy(),
                "timestep": np.array([int(timestep)]),
                "encoder_hidden_states": context,
            }
            uncond, cond = torch.from_numpy(self._unet(arrays)).chunk(2)
            guided = uncond + GUIDANCE_SCALE * (cond - uncond)
            latents = self._scheduler.step(guided, timestep, latents).prev_sample
        step_s = (time.perf_counter() - started) / inputs.steps
        image = self._decoder({"latent_sample": latents.numpy() / np.float32(self._scaling_factor)})[0]
        return np.clip(image.transpose(1, 2, 0) / 2 + 0.5, 0, 1), step_s

    def _encode(self, prompt: str) -> Float32:
        length = self._tokenizer.model_max_length
        tokens = self._tokenizer(
            prompt, padding="max_length", truncation=True, max_length=length, return_tensors="np"
        )
        states: Float32 = self._text({"input_ids": tokens["input_ids"]}).copy()
        return states
