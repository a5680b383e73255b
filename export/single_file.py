"""A checkpoint in one `.safetensors` file with the key layout of the original (CompVis, Stability-AI) code.

Such a file has weights and nothing else: the architecture is read off the tensors' shapes, the tokenizer's
vocabulary comes from elsewhere, and what the U-Net predicts must be said or found.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor

from rt.checkpoint_file import read_bytes, read_json
from rt.errors import CheckpointError
from rt.export import vae
from rt.export.architectures import PAD_TOKENS, SCALING_FACTORS, Architecture, clip, unet
from rt.export.facts import FOLDERS, VAE
from rt.export.hub import download
from rt.export.names import count, part
from rt.export.prediction import read_scheduler, sidecars
from rt.export.weights import read_header, read_headers, read_tensors
from rt.model import Component, Family
from rt.tokenizer import Tokenizer

CLIP_VOCABULARY = "openai/clip-vit-large-patch14"

_UNET = "model.diffusion_model."
_CLIP = {Family.SD1: "cond_stage_model.transformer.", Family.SDXL: "conditioner.embedders.0.transformer."}
_OPEN_CLIP = {Family.SD2: "cond_stage_model.model.", Family.SDXL: "conditioner.embedders.1.model."}

# Other things that come as one file, by a piece of a key that only they have.
_OTHERS = {
    "double_blocks.": "a Flux transformer",
    "joint_blocks.": "a Stable Diffusion 3 transformer",
    "lora": "a LoRA",
    "control_model.": "a ControlNet",
    "conditioner.embedders.0.model.": "an SDXL refiner",
    "edm_mean": "an EDM model such as Playground 2.5",
    "edm_vpred": "an EDM model such as CosXL",
    "down_blocks.": "one network in diffusers' layout",
}
_READS = (
    "rt reads whole text-to-image Stable Diffusion 1.x, 2.x and XL checkpoints in the original key layout"
)

# Side of the latents in training. SD 2 has a 512- and a 768-pixel model, told apart by the prediction type.
_SAMPLE_SIZES = {Family.SD1: 64, Family.SD2: 64, Family.SDXL: 128}
_SAMPLE_SIZE_SD2_V = 96
_USUAL_VAES = {
    Family.SD1: "stabilityai/sd-vae-ft-mse",
    Family.SD2: "stabilityai/sd-vae-ft-mse",
    Family.SDXL: "madebyollin/sdxl-vae-fp16-fix",
}


@dataclass(frozen=True)
class SingleFile:
    """An opened file; see `rt.export.source.Source`."""

    path: Path
    family: Family
    configs: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, Path]
    vocabulary: Path
    licence: str | None
    revision: str | None = None

    def headers(self, component: Component) -> dict[str, Tensor]:
        """Shapes and dtypes of the component's tensors, under diffusers' names."""
        return self._convert(component, read_headers([self.path]))

    def tensors(self, component: Component) -> dict[str, Tensor]:
        """The component's tensors under diffusers' names, memory-mapped."""
        return self._convert(component, read_tensors([self.path]))

    def tokenizer(self, component: Component, max_length: int) -> Tokenizer:
        """CLIP's tokenizer, padded as the encoder was trained."""
        vocab = read_json(self.vocabulary / "vocab.json")
        lines = read_bytes(self.vocabulary / "merges.txt").decode("utf-8", errors="replace").splitlines()
        size = self.configs[FOLDERS[component]]["vocab_size"]
        if len(vocab) > size:
            raise CheckpointError(
                f"{self.vocabulary} has {len(vocab)} tokens, the text encoder {size}: pass its --tokenizer"
            )
        return Tokenizer.build(
            vocab,
            [line for line in lines if line and not line.startswith("#version")],
            max_length=max_length,
            bos_token="<|startoftext|>",
            eos_token="<|endoftext|>",
            pad_token=PAD_TOKENS[self.family][component is Component.TEXT_ENCODER_2],
        )

    def _convert(self, component: Component, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        config = self.configs[FOLDERS[component]]
        try:
            if component is Component.UNET:
                converted = _convert_unet(part(tensors, _UNET), config)
            elif component in (Component.VAE_ENCODER, Component.VAE_DECODER):
                converted = vae.convert(tensors, config)
            elif component is Component.TEXT_ENCODER and self.family in _CLIP:
                converted = convert_ldm_clip_checkpoint(part(tensors, _CLIP[self.family]))
            else:
                prefix = _OPEN_CLIP[self.family]
                converted = _convert_open_clip(part(tensors, prefix), prefix, config)
        except KeyError as error:
            raise _incomplete(self.path, error) from None
        return {name: tensor for name, tensor in converted.items() if tensor is not None}


def open_single_file(
    path: Path,
    tokenizer: str | None,
    prediction_type: str | None,
    offline: bool,
    elsewhere: Collection[str] = (),
) -> SingleFile:
    """Find the architecture of the model in `path`, what it predicts, and a vocabulary for it.

    A VAE that comes from `elsewhere` may be missing, and so may its config be in the result.

    Raises:
        CheckpointError: The file is damaged, is something else, has no VAE, or does not say what its U-Net predicts.
    """
    tensors, metadata = read_header(path)
    family = _family(path, tensors)
    scheduler = read_scheduler(path, family, tensors, metadata, prediction_type)
    try:
        architecture = _architecture(path, tensors, family, scheduler, elsewhere)
    except (KeyError, IndexError) as error:
        raise _incomplete(path, error) from None
    vocabulary = _vocabulary(tokenizer or CLIP_VOCABULARY, offline)
    files = {
        path.name: path,
        **{sidecar.name: sidecar for sidecar in sidecars(path)},
        **{f"tokenizer/{name}": vocabulary / name for name in ("vocab.json", "merges.txt")},
    }
    configs = architecture.configs
    index = {**configs["model_index"], "scheduler": ["diffusers", scheduler["_class_name"]]}
    configs |= {"model_index": index, "scheduler": scheduler}
    return SingleFile(path, family, configs, files, vocabulary, metadata.get("modelspec.license"))


def _family(path: Path, tensors: Mapping[str, Tensor]) -> Family:
    for piece, what in _OTHERS.items():
        if any(piece in name for name in tensors):
            raise CheckpointError(f"{path} is {what}; {_READS}")
    if f"{_UNET}input_blocks.0.0.weight" not in tensors:
        raise CheckpointError(f"{path} has no U-Net ({_UNET}*); {_READS}")
    encoders = {
        Family.SDXL: _OPEN_CLIP[Family.SDXL],
        Family.SD2: _OPEN_CLIP[Family.SD2],
        Family.SD1: _CLIP[Family.SD1],
    }
    for family, prefix in encoders.items():
        if any(name.startswith(prefix) for name in tensors):
            return family
    raise CheckpointError(
        f"{path} has a U-Net and no text encoder ({', '.join(encoders.values())}); {_READS}"
    )


def _vocabulary(tokenizer: str, offline: bool) -> Path:
    names = ("vocab.json", "merges.txt")
    folder = Path(tokenizer)
    try:
        root = folder if folder.is_dir() else download(tokenizer, names, offline=offline)
    except CheckpointError as error:
        raise CheckpointError(
            f"a single file has no CLIP vocabulary, and {error}; or pass --tokenizer, a folder with "
            f"{' and '.join(names)}"
        ) from error
    if absent := [name for name in names if not (root / name).is_file()]:
        raise CheckpointError(f"{tokenizer} has no {absent[0]}: --tokenizer needs {' and '.join(names)}")
    return root


# Tensors to diffusers' names. The converters work on headers (meta tensors) and on weights alike.


def _convert_unet(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = convert_ldm_unet_checkpoint(tensors, config)
    known = {id(tensor) for tensor in converted.values()}
    if dropped := [name for name, tensor in tensors.items() if id(tensor) not in known]:
        raise CheckpointError(f"{dropped[0]} is not part of a U-Net that rt knows; {_READS}")
    return converted


def _convert_open_clip(
    tensors: dict[str, Tensor], prefix: str, config: Mapping[str, Any]
) -> dict[str, Tensor]:
    cut = f"{prefix}transformer.resblocks.{config['num_hidden_layers']}."
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(cut)}
    if prefix == _OPEN_CLIP[Family.SD2]:
        tensors.pop(f"{prefix}text_projection", None)
    encoder = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    converted: dict[str, Tensor] = convert_open_clip_checkpoint(encoder, tensors, prefix)
    return converted


# The architecture, from names and shapes.


def _architecture(
    path: Path,
    tensors: Mapping[str, Tensor],
    family: Family,
    scheduler: Mapping[str, Any],
    elsewhere: Collection[str],
) -> Architecture:
    v_sd2 = family is Family.SD2 and scheduler["prediction_type"] == "v_prediction"
    size = _SAMPLE_SIZE_SD2_V if v_sd2 else _SAMPLE_SIZES[family]
    has_vae = any(name.startswith(vae.PREFIX) for name in tensors)
    if not has_vae and VAE not in elsewhere:
        raise CheckpointError(
            f"{path} has no VAE ({vae.PREFIX}*): name one with --vae, such as {_USUAL_VAES[family]}"
        )
    autoencoder = _vae_config(tensors, family, size) if has_vae else None
    encoders = []
    if family in _CLIP:
        encoders.append(_clip_config(tensors, _CLIP[family]))
    if family in _OPEN_CLIP:
        encoders.append(_open_clip_config(tensors, _OPEN_CLIP[family]))
    return Architecture(family, _unet_config(tensors, size), autoencoder, tuple(encoders))


def _unet_config(tensors: Mapping[str, Tensor], sample_size: int) -> Mapping[str, Any]:
    channels: list[list[int]] = [[]]  # of each residual block, by level
    depths: list[list[int]] = [[]]  # transformer blocks after it
    for i in itertools.count(1):
        block = f"{_UNET}input_blocks.{i}."
        if f"{block}0.op.weight" in tensors:
            channels.append([])
            depths.append([])
        elif f"{block}0.out_layers.3.weight" in tensors:
            channels[-1].append(tensors[f"{block}0.out_layers.3.weight"].shape[0])
            depths[-1].append(count(tensors, f"{block}1.transformer_blocks."))
        else:
            break
    widths = tuple(level[-1] for level in channels)
    middle = f"{_UNET}middle_block.1."
    linear = tensors[f"{middle}proj_in.weight"].ndim == 2
    extra: dict[str, Any] = {}
    if (sizes := tensors.get(f"{_UNET}label_emb.0.0.weight")) is not None:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": sizes.shape[1],
        }
    return unet(
        widths,
        tensors[f"{middle}transformer_blocks.0.attn2.to_k.weight"].shape[1],
        sample_size,
        # Shapes do not tell heads: SD 1 has 8, its successors (linear projections) have 64 channels each.
        [width // 64 for width in widths] if linear else 8,
        depths=[level[-1] for level in depths],
        in_channels=tensors[f"{_UNET}input_blocks.0.0.weight"].shape[1],
        layers_per_block=len(channels[0]),
        use_linear_projection=linear,
        **extra,
    )


def _vae_config(tensors: Mapping[str, Tensor], family: Family, size: int) -> Mapping[str, Any]:
    config = vae.original_config(tensors)
    side = size * 2 ** (len(config["block_out_channels"]) - 1)
    return {**config, "sample_size": side, "scaling_factor": SCALING_FACTORS[family]}


def _clip_config(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Any]:
    if any(name.startswith(f"{prefix}text_model.") for name in tensors):
        prefix += "text_model."
    vocab, width = tensors[f"{prefix}embeddings.token_embedding.weight"].shape
    tokens = tensors[f"{prefix}embeddings.position_embedding.weight"].shape[0]
    layers = count(tensors, f"{prefix}encoder.layers.")
    return clip(width, layers, width // 64, act="quick_gelu", vocab=vocab, tokens=tokens)


def _open_clip_config(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Any]:
    vocab, width = tensors[f"{prefix}token_embedding.weight"].shape
    tokens = tensors[f"{prefix}positional_embedding"].shape[0]
    layers = count(tensors, f"{prefix}transformer.resblocks.")
    projection = tensors.get(f"{prefix}text_projection")
    if projection is not None and prefix == _OPEN_CLIP[Family.SD2]:
        # SD 2 was trained on the last but one layer; a file made from diffusers' weights has lost both.
        layers -= 1
    size = width if projection is None else projection.shape[1]
    return clip(width, layers, width // 64, act="gelu", vocab=vocab, tokens=tokens, projection=size)


def _incomplete(path: Path, missing: KeyError | IndexError) -> CheckpointError:
    return CheckpointError(f"{path} lacks {missing}: the file is incomplete, get it again")
