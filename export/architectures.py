"""The published architectures, as diffusers' configs: SD 1.5, SD 2.1 (768-v), SDXL base, and a tiny SD 1.5.

Sources: the configs of CompVis (v1-inference.yaml), Stability-AI (v2-inference-v.yaml, sd_xl_base.yaml) and
of the diffusers repositories made from them. Only what differs from a class's default is written out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rt.model import Family

Config = Mapping[str, Any]

# The noise of every Stable Diffusion: √β goes linearly over 1000 steps.
_NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
SCHEDULERS: Mapping[Family, Config] = {
    Family.SD1: {
        "_class_name": "PNDMScheduler",
        **_NOISE,
        "prediction_type": "epsilon",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    },
    Family.SD2: {
        "_class_name": "DDIMScheduler",
        **_NOISE,
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "set_alpha_to_one": False,
    },
    Family.SDXL: {
        "_class_name": "EulerDiscreteScheduler",
        **_NOISE,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
    },
}

# What brings the latents of a family to unit variance; the first is diffusers' where a config is silent.
SCALING_FACTORS: Mapping[Family, float] = {Family.SD1: 0.18215, Family.SD2: 0.18215, Family.SDXL: 0.13025}

MODEL_INDEX: Mapping[Family, Config] = {
    family: {
        "_class_name": pipeline,
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", SCHEDULERS[family]["_class_name"]],
        **extra,
    }
    for family, pipeline, extra in (
        (Family.SD1, "StableDiffusionPipeline", {}),
        (Family.SD2, "StableDiffusionPipeline", {}),
        (
            Family.SDXL,
            "StableDiffusionXLPipeline",
            {
                "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
                "tokenizer_2": ["transformers", "CLIPTokenizer"],
                "force_zeros_for_empty_prompt": True,
            },
        ),
    )
}

# What follows an end of text, and so what pads: CLIP-L repeats the end, OpenCLIP has zeros, which are "!".
PAD_TOKENS: Mapping[Family, tuple[str, ...]] = {
    Family.SD1: ("<|endoftext|>",),
    Family.SD2: ("!",),
    Family.SDXL: ("<|endoftext|>", "!"),
}


@dataclass(frozen=True)
class Architecture:
    """The family and the configs of the four or five components, by diffusers' folder names.

    A single file may have no VAE.
    """

    family: Family
    unet: Config
    vae: Config | None
    text_encoders: tuple[Config, ...]

    @property
    def configs(self) -> dict[str, Config]:
        """As a diffusers checkpoint of this architecture has them."""
        folders = ("text_encoder", "text_encoder_2")
        return {
            "model_index": MODEL_INDEX[self.family],
            **dict(zip(folders, self.text_encoders, strict=False)),
            "unet": self.unet,
            **({"vae": self.vae} if self.vae else {}),
            "scheduler": SCHEDULERS[self.family],
        }


def unet(
    channels: tuple[int, ...],
    context: int,
    sample_size: int,
    heads: int | list[int],
    *,
    depths: Sequence[int] = (1, 1, 1, 0),
    **extra: Any,
) -> Config:
    """A U-Net of diffusers; `depths` counts the transformer blocks at each place of a level, finest first."""
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": list(channels),
        "layers_per_block": 2,
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": context,
        # diffusers calls the number of heads `attention_head_dim`; its issue 2011 says why.
        "attention_head_dim": heads,
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        "use_linear_projection": False,
        **extra,
    }


def vae(
    channels: Sequence[int],
    sample_size: int,
    scaling_factor: float = SCALING_FACTORS[Family.SD1],
    layers: int = 2,
    latents: int = 4,
) -> Config:
    """An autoencoder of diffusers with `latents` channels between its halves."""
    return {
        **autoencoder(channels, layers, latents),
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
    }


def autoencoder(channels: Sequence[int], layers: int, latents: int) -> Config:
    """What shapes say of `vae`: neither its sample size nor its scale."""
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": latents,
        "block_out_channels": list(channels),
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }


def clip(
    width: int,
    layers: int,
    heads: int,
    *,
    act: str,
    vocab: int = 49408,
    tokens: int = 77,
    projection: int | None = None,
) -> Config:
    """A CLIP text encoder of transformers; start and end are the last two ids of the vocabulary."""
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": projection or width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": tokens,
        "hidden_act": act,
        "bos_token_id": vocab - 2,
        "eos_token_id": vocab - 1,
    }


_SD_VAE = (128, 256, 512, 512)
_CLIP_L = clip(768, 12, 12, act="quick_gelu")

ARCHITECTURES: Mapping[str, Architecture] = {
    "sd15": Architecture(
        Family.SD1,
        unet((320, 640, 1280, 1280), 768, 64, 8),
        vae(_SD_VAE, 512),
        (_CLIP_L,),
    ),
    "sd21": Architecture(
        Family.SD2,
        unet(
            (320, 640, 1280, 1280),
            1024,
            96,
            [5, 10, 20, 20],
            use_linear_projection=True,
        ),
        vae(_SD_VAE, 768),
        # 23 of OpenCLIP-H's 24 layers: SD 2 was trained on the last but one.
        (clip(1024, 23, 16, act="gelu"),),
    ),
    "sdxl": Architecture(
        Family.SDXL,
        unet(
            (320, 640, 1280),
            2048,
            128,
            [5, 10, 20],
            depths=(0, 2, 10),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        vae(_SD_VAE, 1024, SCALING_FACTORS[Family.SDXL]),
        (_CLIP_L, clip(1280, 32, 20, act="gelu")),
    ),
    "tiny": Architecture(
        Family.SD1,
        unet((32, 64), 32, 16, 2, depths=(1, 0), layers_per_block=1),
        vae((32, 32, 32, 64), 128, layers=1),
        (clip(32, 2, 4, act="quick_gelu", vocab=514),),
    ),
}
