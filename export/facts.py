"""The facts of a model from the configs of its components; what rt does not run is refused here, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rt.errors import CheckpointError
from rt.model import Component, Family, ModelSpec

# The folder of each component in a diffusers checkpoint, and the class that it must be of.
FOLDERS = {
    Component.TEXT_ENCODER: "text_encoder",
    Component.TEXT_ENCODER_2: "text_encoder_2",
    Component.UNET: "unet",
    Component.VAE_ENCODER: "vae",
    Component.VAE_DECODER: "vae",
}
CLASSES = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}

_PIPELINES = {
    "StableDiffusionPipeline": ("text_encoder",),
    "StableDiffusionImg2ImgPipeline": ("text_encoder",),
    "StableDiffusionInpaintPipeline": ("text_encoder",),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2"),
    "StableDiffusionXLImg2ImgPipeline": ("text_encoder", "text_encoder_2"),
    "StableDiffusionXLInpaintPipeline": ("text_encoder", "text_encoder_2"),
}
_READS = "rt reads text-to-image and inpainting Stable Diffusion 1.x, 2.x and XL: use such a checkpoint"

# What transformers takes where the config of a text encoder is silent.
_CLIP_DEFAULTS = {"hidden_size": 512, "projection_dim": 512, "max_position_embeddings": 77}

# Inputs of the U-Net that text-to-image has no value for, by the key of its config.
_OTHER_CONDITIONING = {
    "class_embed_type": "class embeddings",
    "num_class_embeds": "class embeddings",
    "time_cond_proj_dim": "an embedding of the guidance scale (a distilled model such as LCM)",
    "encoder_hid_dim": "projected image or text features",
    "encoder_hid_dim_type": "projected image or text features",
}
_OTHER_INPUTS = {5: "depth to image", 7: "upscaling", 8: "image editing"}


def components(configs: Mapping[str, Mapping[str, Any]], where: str) -> tuple[Component, ...]:
    """Text encoders in order, U-Net and both halves of the VAE of the pipeline that `model_index.json` names.

    Raises:
        CheckpointError: The pipeline, or the class of one of its parts, is none that rt runs.
    """
    index = configs["model_index"]
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in _PIPELINES:
        raise CheckpointError(f"{where} is a {pipeline or 'model of no named class'}; {_READS}")
    if pipeline.startswith("StableDiffusionXL") and _class_name(index, "text_encoder") is None:
        raise CheckpointError(
            f"{where} is an SDXL refiner, which only continues another model's images; {_READS}"
        )
    folders = (*_PIPELINES[pipeline], "unet", "vae")
    for folder in folders:
        own = configs.get(folder, {}).get("_class_name", CLASSES[folder])
        for name in (_class_name(index, folder), own):
            if name != CLASSES[folder]:
                raise CheckpointError(
                    f"{where} has {name or 'no class'} as {folder}, rt reads {CLASSES[folder]}; {_READS}"
                )
    return tuple(component for component, folder in FOLDERS.items() if folder in folders)


def read_spec(configs: Mapping[str, Mapping[str, Any]], where: str) -> ModelSpec:
    """The facts in `configs`, keyed by diffusers' folder names and `model_index`.

    Raises:
        CheckpointError: The model has inputs that rt has no value for, or its configs contradict each other.
    """
    encoders = tuple(part for part in components(configs, where) if FOLDERS[part].startswith("text_encoder"))
    unet, vae = configs["unet"], configs["vae"]
    text = [{**_CLIP_DEFAULTS, **configs[FOLDERS[encoder]]} for encoder in encoders]
    try:
        _refuse_other_conditioning(unet, vae, len(encoders), where)
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        spec = ModelSpec(
            family=_family(unet, encoders),
            latent_channels=_integer(vae["latent_channels"]),
            vae_scale_factor=factor,
            sample_size=_integer(unet.get("sample_size") or vae["sample_size"] // factor),
            scaling_factor=vae.get("scaling_factor", 0.18215),
            text_encoders=encoders,
            max_tokens=text[0]["max_position_embeddings"],
            context_size=_integer(unet["cross_attention_dim"]),
            pooled_size=text[1]["projection_dim"] if len(text) > 1 else None,
            zero_negative=len(text) > 1 and configs["model_index"].get("force_zeros_for_empty_prompt", True),
            scheduler=configs["scheduler"],
            inpainting=unet["in_channels"] != vae["latent_channels"],
        )
        states = sum(config["hidden_size"] for config in text)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: a config lacks a fact or has another type there: {error}") from None
    if states != spec.context_size:
        raise CheckpointError(
            f"{where}: the text encoders give {states} channels and the U-Net wants {spec.context_size}: "
            "they are parts of different models"
        )
    return spec


def _class_name(index: Mapping[str, Any], folder: str) -> str | None:
    """The class of an entry of `model_index.json`, which is `[library, class]` or `[null, null]`."""
    entry = index.get(folder)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no integer")
    return value


def _family(unet: Mapping[str, Any], encoders: tuple[Component, ...]) -> Family:
    if len(encoders) > 1:
        return Family.SDXL
    return Family.SD2 if unet.get("use_linear_projection") else Family.SD1


def _refuse_other_conditioning(
    unet: Mapping[str, Any], vae: Mapping[str, Any], encoders: int, where: str
) -> None:
    inputs, latents = unet["in_channels"], vae["latent_channels"]
    addition = "text_time" if encoders > 1 else None
    if inputs not in (latents, 2 * latents + 1):  # the latter for inpainting: mask and surroundings
        purpose = _OTHER_INPUTS.get(inputs, "another task")
        raise CheckpointError(f"{where} has a U-Net of {inputs} input channels, for {purpose}; {_READS}")
    for key, conditioning in _OTHER_CONDITIONING.items():
        if unet.get(key) is not None:
            raise CheckpointError(
                f"{where} has a U-Net that wants {conditioning} ({key} {unet[key]!r}); {_READS}"
            )
    if unet.get("addition_embed_type") != addition:
        raise CheckpointError(
            f"{where} has addition_embed_type {unet.get('addition_embed_type')!r}, not {addition!r}; {_READS}"
        )
    if any(vae.get(key) is not None for key in ("latents_mean", "latents_std", "shift_factor")):
        raise CheckpointError(f"{where} has latents that are shifted as well as scaled; {_READS}")
