"""The three networks as ONNX graphs, as a user gets them from `torch.onnx.export` without changing a model.

https://docs.pytorch.org/docs/stable/onnx_export.html
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from rt.bench.peers.once import make_once


class TextEncoder(nn.Module):
    """input_ids (1, T) int64 → states (1, T, D)."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.encoder = pipeline.text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """See the class."""
        states: Tensor = self.encoder(input_ids).last_hidden_state
        return states


class UNet(nn.Module):
    """sample (2, C, h, w), timestep (1,) int64, encoder_hidden_states (2, T, D) → prediction (2, C, h, w)."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.unet = pipeline.unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """See the class."""
        prediction: Tensor = self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return prediction


class VAEDecoder(nn.Module):
    """latent_sample (1, C, h, w), not scaled → image (1, 3, H, W)."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.vae = pipeline.vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        """See the class."""
        image: Tensor = self.vae.decode(latent_sample, return_dict=False)[0]
        return image


PARTS: Mapping[str, type[nn.Module]] = {
    "text_encoder": TextEncoder,
    "unet": UNet,
    "vae_decoder": VAEDecoder,
}
"""By the names of the folders in which OpenVINO keeps them."""


def open_pipeline(checkpoint: Path) -> Any:
    """The pipeline in float32, to export from."""
    return StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)


def example_inputs(pipeline: Any) -> dict[str, dict[str, Tensor]]:
    """Of each part, in the order of its `forward`."""
    config, tokens = pipeline.unet.config, pipeline.tokenizer.model_max_length
    size = config.sample_size
    return {
        "text_encoder": {"input_ids": torch.ones(1, tokens, dtype=torch.int64)},
        "unet": {
            "sample": torch.randn(2, config.in_channels, size, size),
            "timestep": torch.tensor([1]),
            "encoder_hidden_states": torch.randn(2, tokens, config.cross_attention_dim),
        },
        "vae_decoder": {"latent_sample": torch.randn(1, config.in_channels, size, size)},
    }


def export(checkpoint: Path, work: Path) -> Path:
    """The folder of `<part>.onnx`, made the first time."""

    def write(folder: Path) -> None:
        pipeline = open_pipeline(checkpoint)
        for name, inputs in example_inputs(pipeline).items():
            module = PARTS[name](pipeline).eval()
            program = torch.onnx.export(module, (), kwargs=inputs, dynamo=True, verbose=False)
            assert program is not None
            program.save(folder / f"{name}.onnx", external_data=True)

    return make_once(work / "onnx", write)
