"""LoRAs (Hu et al. 2021, arXiv:2106.09685): a style, everything becomes pixel art; what another U-Net has learned."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from diffusion import DiffusionTask
from model import Model

RANK = 8
TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
]


@torch.no_grad()
def difference(before: nn.Module, after: nn.Module, rank: int) -> dict[str, Tensor]:
    """What `after` has over `before`, as the nearest LoRA of this rank, in float8 (e4m3).

    The largest singular values of each matrix and convolution (Eckart & Young 1936). Biases and norms stay those of
    `before`. A float16 file of the same size has half the rank, and draws worse.
    """
    old, lora = before.state_dict(), {}
    for name, new in after.state_dict().items():
        if new.ndim > 1:
            change = new.float().cpu() - old[name].float().cpu()
            left, values, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
            kept = values[:rank].sqrt()
            up, down = left[:, :rank] * kept, kept[:, None] * right[:rank]
            pair = {
                "lora_A": down.unflatten(1, change.shape[1:]),
                "lora_B": up[(..., *[None] * (new.ndim - 2))],
            }
            for role, tensor in pair.items():
                part = f"{name.removesuffix('.weight')}.{role}.weight"
                lora[part] = tensor.to(torch.float8_e4m3fn).contiguous()
    return lora


def save_lora(lora: dict[str, Tensor], path: Path) -> None:
    """In diffusers' layout."""
    StableDiffusionPipeline.save_lora_weights(path.parent, unet_lora_layers=lora, weight_name=path.name)


class LoraTask(DiffusionTask):
    """Denoising of pictures in the new style; only the low-rank additions learn."""

    name = "pixel-art"

    def __init__(self, model: Model, *args: Any):
        unet = copy.deepcopy(model.unet)
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
        super().__init__(replace(model, unet=unet), *args)
        self.modules = nn.ModuleDict({"unet": unet})

    def export(self, folder: Path) -> None:
        """As ``FOLDER/pixel-art.safetensors``."""
        save_lora(get_peft_model_state_dict(self.model.unet), folder / f"{self.name}.safetensors")
