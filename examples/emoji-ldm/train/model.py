"""The networks of a latent diffusion model and how they are put together, all of them diffusers' and transformers'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from config import Config
from world import CONTEXT

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    # The last step must hide even the mean of a latent, or backgrounds come out grey: this schedule's signal there
    # is 0.006, against 0.068 of Stable Diffusion's (Lin et al. 2023, arXiv:2305.08891).
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "steps_offset": 1,  # of no effect here, but diffusers warns without it
}


@dataclass(frozen=True, eq=False)
class Model:
    """The parts of one model."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel

    def tokenize(self, captions: list[str]) -> Tensor:
        """int64 [N, 16]: start, words, end, padding."""
        settings = {"padding": "max_length", "max_length": CONTEXT, "truncation": True}
        return self.tokenizer(captions, **settings, return_tensors="pt").input_ids

    def pipeline(self) -> StableDiffusionPipeline:
        """The whole in diffusers' words."""
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=DDIMScheduler(**SCHEDULE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def build(config: Config, tokenizer: CLIPTokenizer, vae: AutoencoderKL) -> Model:
    """Untrained text encoder and U-Net beside a trained autoencoder."""
    return Model(vae, _text_encoder(config, tokenizer), tokenizer, _unet(config))


def for_training(unet: UNet2DConditionModel) -> None:
    """Plain products on a CPU: there the backward of PyTorch's fused attention takes 40 % of a step."""
    if not torch.cuda.is_available():
        unet.set_attn_processor(AttnProcessor())


def _text_encoder(config: Config, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_width // 48,
            projection_dim=config.text_width,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",  # see for_training
        )
    )


def _unet(config: Config) -> UNet2DConditionModel:
    """A U-Net whose residual branches begin as nothing, so that it begins as nearly the identity."""
    unet = UNet2DConditionModel(
        sample_size=config.size // config.factor,
        block_out_channels=config.unet_channels,
        down_block_types=tuple(f"{'CrossAttn' * on}DownBlock2D" for on in config.unet_attention),
        up_block_types=tuple(f"{'CrossAttn' * on}UpBlock2D" for on in reversed(config.unet_attention)),
        layers_per_block=1,
        cross_attention_dim=config.text_width,
        attention_head_dim=4,  # the number of heads, by a slip of the format
        norm_num_groups=32,
    )
    for name, module in unet.named_modules():
        if name.endswith((".conv2", ".proj_out")) or name == "conv_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet
