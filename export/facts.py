"""The facts of a model from the configs of its components; what rt does not run is refused here, by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from rt.decode import decode
from rt.errors import CheckpointError, shown
from rt.export.architectures import SCALING_FACTORS
from rt.export.repairs import sample_size, scheduler_config
from rt.export.weights import LARGEST, LONGEST
from rt.model import Component, Family, ModelSpec

VAE = "vae"
OR_VAE = "; or name one with --vae"

# The folder of each component in a diffusers checkpoint, and the class that it must be of.
FOLDERS = {
    Component.TEXT_ENCODER: "text_encoder",
    Component.TEXT_ENCODER_2: "text_encoder_2",
    Component.UNET: "unet",
    Component.VAE_ENCODER: VAE,
    Component.VAE_DECODER: VAE,
}
CLASSES = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "unet": "UNet2DConditionModel",
    VAE: "AutoencoderKL",
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

_LEVELS = 10
_SIZES = 6
"""Of SDXL: height and width of the original, of the crop's corner and of the picture, each as an embedding."""

# Inputs of the U-Net that text-to-image has no value for, by the key of its config.
_OTHER_CONDITIONING = {
    "class_embed_type": "class embeddings",
    "num_class_embeds": "class embeddings",
    "time_cond_proj_dim": "an embedding of the guidance scale (a distilled model such as LCM)",
    "encoder_hid_dim": "projected image or text features",
    "encoder_hid_dim_type": "projected image or text features",
}
_OTHER_INPUTS = {5: "depth to image", 7: "upscaling", 8: "image editing"}


def components(
    configs: Mapping[str, Mapping[str, Any]], where: str, elsewhere: Collection[str] = ()
) -> tuple[Component, ...]:
    """Text encoders in order, U-Net and both halves of the VAE of the pipeline that `model_index.json` names.

    What is in the folders in `elsewhere` does not matter.

    Raises:
        CheckpointError: The pipeline, or the class of one of its parts, is none that rt runs.
    """
    index = configs["model_index"]
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in _PIPELINES:
        raise CheckpointError(f"{where} is a {_plain(pipeline or 'model of no named class')}; {_READS}")
    if pipeline.startswith("StableDiffusionXL") and _class_name(index, "text_encoder") is None:
        raise CheckpointError(
            f"{where} is an SDXL refiner, which only continues another model's images; {_READS}"
        )
    folders = (*_PIPELINES[pipeline], "unet", VAE)
    for folder in folders:
        if folder in elsewhere:
            continue
        own = configs.get(folder, {}).get("_class_name", CLASSES[folder])
        for name in (_class_name(index, folder), own):
            if name != CLASSES[folder]:
                raise CheckpointError(
                    f"{where} has {_plain(name or 'no class')} as {folder}, rt reads {CLASSES[folder]}; {_READS}"
                    f"{OR_VAE * (folder == VAE)}"
                )
    return tuple(component for component, folder in FOLDERS.items() if folder in folders)


def read_spec(configs: Mapping[str, Mapping[str, Any]], where: str) -> ModelSpec:
    """The facts in `configs`, keyed by diffusers' folder names and `model_index`; old configs are read as repaired.

    Raises:
        CheckpointError: A fact is missing or means nothing, the model has inputs that rt has no value for, or its
            configs contradict each other.
    """
    encoders = tuple(part for part in components(configs, where) if FOLDERS[part].startswith("text_encoder"))
    index = _facts(_Pipeline, configs, "model_index", where)
    unet, vae = read_unet(configs, where), read_vae(configs, where)
    text = [_facts(_TextEncoder, configs, FOLDERS[encoder], where) for encoder in encoders]
    _refuse_other_conditioning(configs["unet"], configs["vae"], len(encoders), where)
    given = {"channels": sum(encoder.hidden_size for encoder in text)}
    wanted = {"channels": unet.cross_attention_dim}
    if len(text) > 1:
        given["values beside them"] = (text[1].projection_dim or 0) + _SIZES * (
            unet.addition_time_embed_dim or 0
        )
        wanted["values beside them"] = unet.projection_class_embeddings_input_dim or 0
    for what in given:
        if given[what] != wanted[what]:
            raise CheckpointError(
                f"{where}: the text encoders give {given[what]} {what} and the U-Net wants {wanted[what]}: "
                "they are parts of different models"
            )
    return ModelSpec(
        family=_family(unet, encoders),
        latent_channels=vae.latent_channels,
        vae_scale_factor=vae.scale_factor,
        sample_size=sample_size(
            configs["model_index"], configs["unet"], unet.sample_size or vae.latents, where
        ),
        scaling_factor=SCALING_FACTORS[Family.SD1] if vae.scaling_factor is None else vae.scaling_factor,
        text_encoders=encoders,
        max_tokens=text[0].max_position_embeddings,
        context_size=unet.cross_attention_dim,
        pooled_size=text[1].projection_dim if len(text) > 1 else None,
        zero_negative=len(text) > 1 and bool(index.force_zeros_for_empty_prompt),
        scheduler=scheduler_config(configs["model_index"], configs["scheduler"], where),
        inpainting=unet.in_channels != vae.latent_channels,
    )


def read_unet(configs: Mapping[str, Mapping[str, Any]], where: str) -> UNetFacts:
    """The facts of the U-Net in `configs`, or a `CheckpointError`."""
    return _facts(UNetFacts, configs, "unet", where)


def read_vae(configs: Mapping[str, Mapping[str, Any]], where: str) -> VaeFacts:
    """The facts of the VAE in `configs`, or a `CheckpointError`."""
    return _facts(VaeFacts, configs, VAE, where)


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What is read of a config, by its keys there; a default is what the class of the component takes.

    Raises:
        ValueError: A size or a factor that no model has.
    """

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            for number in value if isinstance(value, list | tuple) else (value,):
                if type(number) is int and not 1 <= number <= LARGEST:
                    raise ValueError(f"{name} is {number}, expected 1 to {LARGEST:,}")
            if name == "sample_size" and isinstance(value, list) and len(value) != 2:
                raise ValueError(f"sample_size has {len(value)} entries, expected a height and a width")


@dataclass(frozen=True, kw_only=True)
class _Pipeline(_Facts):
    force_zeros_for_empty_prompt: bool | None = True


@dataclass(frozen=True, kw_only=True)
class UNetFacts(_Facts):
    """Of the U-Net."""

    in_channels: int
    out_channels: int = 4
    cross_attention_dim: int
    sample_size: int | list[int] | None = None
    use_linear_projection: bool | None = False
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None


@dataclass(frozen=True, kw_only=True)
class VaeFacts(_Facts):
    """Of the autoencoder; where its config has no scaling factor, None."""

    latent_channels: int
    block_out_channels: tuple[int, ...]
    sample_size: int | list[int] = 32
    scaling_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.block_out_channels) <= _LEVELS:
            raise ValueError(
                f"block_out_channels has {len(self.block_out_channels)} entries, expected 1 to {_LEVELS}"
            )
        if self.scaling_factor is not None and self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor is {self.scaling_factor}, expected more than 0")

    @property
    def scale_factor(self) -> int:
        """Pixels a latent, along one side."""
        return 1 << len(self.block_out_channels) - 1

    @property
    def latents(self) -> int | list[int]:
        """`sample_size` after the encoder."""
        if isinstance(self.sample_size, list):
            return [max(side // self.scale_factor, 1) for side in self.sample_size]
        return max(self.sample_size // self.scale_factor, 1)


@dataclass(frozen=True, kw_only=True)
class _TextEncoder(_Facts):
    hidden_size: int = 512
    projection_dim: int | None = 512
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    """No fact of the model, but transformers would take a list or nothing, and a prompt must end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_position_embeddings < 3:
            raise ValueError(f"max_position_embeddings is {self.max_position_embeddings}: no room for a word")


F = TypeVar("F", bound=_Facts)


def _facts(kind: type[F], configs: Mapping[str, Mapping[str, Any]], folder: str, where: str) -> F:
    known = {field.name for field in fields(kind)}
    values = {key: value for key, value in configs[folder].items() if key in known}
    try:
        for key, value in values.items():
            if isinstance(value, list) and len(value) > LONGEST:
                raise ValueError(f"{folder}.{key} has {len(value):,} entries, expected at most {LONGEST:,}")
        return decode(kind, values, folder)
    except ValueError as error:
        raise CheckpointError(
            f"{where}: in the configs, {error}; correct it, or get the model again"
        ) from None


def _plain(name: object) -> str:
    return shown(name).strip("'")


def _class_name(index: Mapping[str, Any], folder: str) -> Any:
    """The class of an entry of `model_index.json`, which is `[library, class]` or `[null, null]`."""
    entry = index.get(folder)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _family(unet: UNetFacts, encoders: tuple[Component, ...]) -> Family:
    if len(encoders) > 1:
        return Family.SDXL
    return Family.SD2 if unet.use_linear_projection else Family.SD1


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
                f"{where} has a U-Net that wants {conditioning} ({key} {shown(unet[key])}); {_READS}"
            )
    if unet.get("addition_embed_type") != addition:
        raise CheckpointError(
            f"{where} has addition_embed_type {shown(unet.get('addition_embed_type'))}, not {addition!r}; {_READS}"
        )
    if any(vae.get(key) is not None for key in ("latents_mean", "latents_std", "shift_factor")):
        raise CheckpointError(f"{where} has latents that are shifted as well as scaled; {_READS}")
