"""The models that are timed: real shapes, random weights made on the GPU, and inputs that all candidates share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rt.bench.bundle import PROMPT
from rt.bench.gpu_parts.place import Place
from rt.bench.gpu_parts.settings import GUIDANCE_SCALE, Setting
from rt.export.architectures import ARCHITECTURES, Architecture, clip, unet, vae
from rt.export.checkpoint import Checkpoint
from rt.export.facts import FOLDERS, read_spec
from rt.export.source import Kind
from rt.export.synthetic import Synthetic
from rt.export.weights import build
from rt.model import Component, Family
from rt.shapes import ShapeProfile

_TEXT = (
    clip(32, 2, 4, act="quick_gelu", vocab=514),
    clip(32, 2, 4, act="gelu", vocab=514, projection=32),
)
TINY = {
    Family.SD1: Architecture(
        Family.SD1,
        unet((32, 64), 32, 32, 2, depths=(1, 0), layers_per_block=1),
        vae((32, 32), 64, layers=1),
        _TEXT[:1],
    ),
    Family.SDXL: Architecture(
        Family.SDXL,
        unet(
            (32, 64),
            64,
            32,
            2,
            depths=(0, 2),
            layers_per_block=1,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        ),
        vae((32, 32), 64, layers=1),
        _TEXT,
    ),
}
"""What a dry run has in place of the models: the same operators, few of them, with few channels."""


class Peer(Protocol):
    """A candidate with one model loaded; every call uses the same inputs and the same buffers."""

    name: str

    def unet(self) -> Tensor:
        """Enqueue one evaluation of the U-Net, guided or not → its output (R, C, h, w), valid until the next call."""

    def vae(self) -> Tensor:
        """Enqueue the decoding of one picture → (1, 3, H, W), in [-1, 1] up to overshoot."""

    def picture(self, steps: int) -> NDArray[np.uint8]:
        """Tokens to a picture (H, W, 3) in the host's memory, ready on return."""


@dataclass(frozen=True)
class RandomWeights(Synthetic):
    """A synthetic checkpoint whose weights are made on a GPU: seconds, where a CPU takes minutes."""

    device: str = "cpu"

    def tensors(self, component: Component) -> Mapping[str, Tensor]:
        """The same in every call, in float32, in the host's memory, where building begins."""
        with torch.random.fork_rng(), torch.device(self.device):
            torch.manual_seed(0)
            module = build(component, self.configs[FOLDERS[component]])
        return {name: tensor.cpu() for name, tensor in module.state_dict().items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """What all candidates get, on the device.

    Attributes:
        tokens: For each text encoder int64 (R, T), the unconditional row first where there is one.
        latents: float32 (1, C, h, w).
        timestep: A whole number.
        context: float32 (R, T, D).
        pooled: float32 (R, P), for XL.
        sizes: float32 (R, 6), for XL.
    """

    tokens: Mapping[Component, Tensor]
    latents: Tensor
    timestep: int
    context: Tensor
    pooled: Tensor | None
    sizes: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Model:
    """A setting on a device."""

    setting: Setting
    place: Place
    seed: int

    @property
    def profile(self) -> ShapeProfile:
        """Its shape."""
        return ShapeProfile(self.setting.side, self.setting.side)

    @property
    def guidance_scale(self) -> float:
        """1 where there is no guidance."""
        return GUIDANCE_SCALE if self.setting.guided else 1.0

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights: fp16, or fp32 where a CPU runs."""
        return torch.float32 if self.place.dry else torch.float16

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Random weights under the configs of the architecture."""
        architecture = ARCHITECTURES[self.setting.architecture]
        if self.place.dry:
            architecture = TINY.get(architecture.family, TINY[Family.SD1])
        name = f"synthetic:{self.setting.architecture}"
        configs = architecture.configs
        scheduler = {**configs["scheduler"], **self.setting.sampler}
        configs["scheduler"] = scheduler
        configs["model_index"] = {
            **configs["model_index"],
            "scheduler": ["diffusers", scheduler["_class_name"]],
        }
        spec = read_spec(configs, name)
        configs["unet"] = {**configs["unet"], "sample_size": self.setting.side // spec.vae_scale_factor}
        return Checkpoint(
            name=name,
            kind=Kind.SYNTHETIC,
            revision=None,
            files={},
            spec=read_spec(configs, name),
            configs=configs,
            licence=None,
            source=RandomWeights(architecture, configs, {}, device=self.place.device.type),
        )

    @cached_property
    def inputs(self) -> Inputs:
        """Drawn from the seed."""
        spec, rows = self.checkpoint.spec, 1 + self.setting.guided
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.place.device)

        side = self.setting.side
        sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32, device=self.place.device)
        texts = ["", PROMPT][-rows:]
        tokens = {}
        for encoder in spec.text_encoders:
            tokenizer = self.checkpoint.tokenizer(encoder)
            ids = np.stack([tokenizer(text).ids for text in texts])
            tokens[encoder] = torch.from_numpy(ids).long().to(self.place.device)
        return Inputs(
            tokens=tokens,
            latents=randn(1, *spec.latent_shape(side, side)),
            timestep=int(torch.randint(1, 1000, (), generator=generator)),
            context=randn(rows, spec.max_tokens, spec.context_size),
            pooled=None if spec.pooled_size is None else randn(rows, spec.pooled_size),
            sizes=None if spec.pooled_size is None else sizes.expand(rows, 6),
        )
