"""A style as a LoRA (Hu et al. 2021, arXiv:2106.09685): everything becomes pixel art."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

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


class LoraTask(DiffusionTask):
    """Denoising of pictures in the new style; only the low-rank additions learn."""

    name = "pixel-art"

    def __init__(self, model: Model, *args: Any):
        unet = copy.deepcopy(model.unet)
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
        super().__init__(replace(model, unet=unet), *args)
        self.modules = nn.ModuleDict({"unet": unet})

    def export(self, folder: Path) -> None:
        """As ``FOLDER/pixel-art.safetensors``, in diffusers' layout."""
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=get_peft_model_state_dict(self.model.unet),
            weight_name=f"{self.name}.safetensors",
        )
