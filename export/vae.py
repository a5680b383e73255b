"""An autoencoder: its config from a file that has none, and one from elsewhere in the place of a checkpoint's own.

Files are in the layout of the original (CompVis, Stability-AI) code, where whole checkpoints have the prefix
`first_stage_model.`, or in that of diffusers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from rt.checkpoint_file import read_json
from rt.errors import CheckpointError
from rt.export.architectures import SCALING_FACTORS, autoencoder
from rt.export.facts import CLASSES, VAE, read_unet, read_vae
from rt.export.folder import choose_weights, refuse_code
from rt.export.hub import download, is_offline, look_up
from rt.export.names import count, without_prefix
from rt.export.source import Kind, Source
from rt.export.weights import read_header, read_headers, read_tensors
from rt.model import Component, Family
from rt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PREFIX = "first_stage_model."
_PREFIXES = (PREFIX, "vae.", "")
_READS = "--vae takes an AutoencoderKL: a diffusers folder, a hub id or a .safetensors file"
_HALVES = (Component.VAE_ENCODER, Component.VAE_DECODER)


@dataclass(frozen=True)
class Vae:
    """An opened autoencoder.

    Attributes:
        name: What the user typed.
        config: For diffusers' class; without what a file of weights does not say.
        files: Every file that shapes the result, by its name in a checkpoint that has this VAE.
        weights: Those of them that have tensors.
        convert: Tensors of the files to those under diffusers' names.
    """

    name: str
    config: Mapping[str, Any]
    files: Mapping[str, Path]
    weights: tuple[Path, ...]
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict


def open_vae(name: str, offline: bool) -> Vae:
    """Open the VAE `name`: a folder of one, a model's folder or hub repository, or a `.safetensors` file.

    Raises:
        CheckpointError: There is none, it is damaged, or it is of a kind that rt does not run.
        PickleError: The weights are in a format that can run code.
    """
    kind = Kind.of(name)
    if kind is Kind.SINGLE_FILE:
        return _open_file(name, Path(name))
    if kind is Kind.HUB:
        return _open_hub(name, offline)
    if kind is Kind.FOLDER:
        return _open_folder(name, Path(name))
    raise CheckpointError(f"{name} has no weights to take; {_READS}")


def replace_vae(source: Source, replacement: Vae, where: str) -> Source:
    """`source`, which messages call `where`, with another VAE.

    Latents are scaled as the VAE's config says; where it is silent as the checkpoint's own, else as the family's.

    Raises:
        CheckpointError: The U-Net was made for other latents, or a config has not what rt must know.
    """
    own_config = source.configs.get(VAE, {})
    if own_config.get("_class_name", CLASSES[VAE]) != CLASSES[VAE]:
        own_config = {}  # AutoencoderTiny and its like scale otherwise and say nothing of this one
    new = read_vae({VAE: replacement.config}, replacement.name)
    own = read_vae({VAE: own_config}, where) if own_config else new
    latents = read_unet(source.configs, where).out_channels
    if new.latent_channels != latents:
        raise CheckpointError(
            f"the VAE {replacement.name} has {new.latent_channels} latent channels, and the U-Net {latents}: "
            "it is for another model"
        )
    if new.scale_factor != own.scale_factor:
        raise CheckpointError(
            f"the VAE {replacement.name} makes {new.scale_factor} x {new.scale_factor} pixels of a latent, and the "
            f"checkpoint's own {own.scale_factor} x {own.scale_factor}: it is for another model"
        )
    family = Family.SDXL if "text_encoder_2" in source.configs else Family.SD1
    usual = SCALING_FACTORS[family]
    if own_config and own.scaling_factor is not None:
        usual = own.scaling_factor
    scale = usual if new.scaling_factor is None else new.scaling_factor
    if scale != usual:
        logger.warning(
            "the VAE %s scales latents by %s and such a model's own by %s: is it for another model?",
            replacement.name,
            scale,
            usual,
        )
    # The size is the model's, and counts where the U-Net does not say it.
    config = {**replacement.config, "sample_size": own.sample_size, "scaling_factor": scale}
    index = {**source.configs["model_index"], VAE: ["diffusers", CLASSES[VAE]]}
    return _WithVae(source, replacement, {**source.configs, "model_index": index, VAE: config})


@dataclass(frozen=True)
class _WithVae:
    """A source whose VAE comes from elsewhere; see `rt.export.source.Source`."""

    source: Source
    vae: Vae
    configs: Mapping[str, Mapping[str, Any]] = field(repr=False)

    @property
    def files(self) -> Mapping[str, Path]:
        """Those of the source but for its own VAE, and those of the VAE."""
        kept = {name: path for name, path in self.source.files.items() if not name.startswith(f"{VAE}/")}
        return {**kept, **self.vae.files}

    @property
    def revision(self) -> str | None:
        """The source's."""
        return self.source.revision

    @property
    def licence(self) -> str | None:
        """The source's."""
        return self.source.licence

    def headers(self, component: Component) -> Mapping[str, Tensor]:
        """Of the VAE, or what the source has."""
        if component in _HALVES:
            return self.vae.convert(read_headers(self.vae.weights))
        return self.source.headers(component)

    def tensors(self, component: Component) -> Mapping[str, Tensor]:
        """Of the VAE, or what the source has; memory-mapped."""
        if component in _HALVES:
            return self.vae.convert(read_tensors(self.vae.weights))
        return self.source.tensors(component)

    def tokenizer(self, component: Component, max_length: int) -> Tokenizer:
        """The source's."""
        return self.source.tokenizer(component, max_length)


def original_config(tensors: Mapping[str, Tensor], prefix: str = PREFIX) -> Mapping[str, Any]:
    """diffusers' config of a VAE in the original layout, from shapes, which say neither sample size nor scale.

    Raises:
        KeyError: A tensor is missing.
    """
    # Of one level at least, so that the error names a tensor where there is none.
    levels = range(count(tensors, f"{prefix}encoder.down.") or 1)
    channels = [tensors[f"{prefix}encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in levels]
    layers = count(tensors, f"{prefix}encoder.down.0.block.")
    return autoencoder(channels, layers, tensors[f"{prefix}decoder.conv_in.weight"].shape[1])


def convert(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], prefix: str = PREFIX
) -> dict[str, Tensor]:
    """A VAE's tensors from the original layout to diffusers'; those outside `prefix` are left out.

    Raises:
        KeyError: A tensor is missing.
    """
    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(without_prefix(tensors, prefix), config)
    return converted


def _diffusers_config(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Any]:
    blocks = f"{prefix}encoder.down_blocks."
    levels = range(count(tensors, blocks))
    channels = [tensors[f"{blocks}{i}.resnets.0.conv1.weight"].shape[0] for i in levels]
    layers = count(tensors, f"{blocks}0.resnets.")
    return autoencoder(channels, layers, tensors[f"{prefix}decoder.conv_in.weight"].shape[1])


def _open_file(name: str, path: Path) -> Vae:
    tensors, _ = read_header(path)
    prefixes = [each for each in _PREFIXES if any(key.startswith(f"{each}decoder.") for key in tensors)]
    prefix = prefixes[0] if prefixes else ""
    if f"{prefix}quantize.embedding.weight" in tensors:
        raise CheckpointError(f"{name} is a VQ autoencoder; {_READS}")
    files, beside = {f"{VAE}/{path.name}": path}, path.with_name("config.json")
    try:
        if any(key.startswith(f"{prefix}encoder.down.") for key in tensors):
            config = original_config(tensors, prefix)
            return Vae(name, config, files, (path,), lambda part: convert(part, config, prefix))
        if any(key.startswith(f"{prefix}encoder.down_blocks.") for key in tensors):
            if not prefix and beside.is_file() and read_json(beside).get("_class_name") == CLASSES[VAE]:
                return _with_config(name, beside, (path,))
            config = _diffusers_config(tensors, prefix)
            return Vae(name, config, files, (path,), lambda part: without_prefix(part, prefix))
    except KeyError as error:
        raise CheckpointError(f"{name} lacks {error}: the file is incomplete, get it again") from None
    raise CheckpointError(f"{name} has no VAE that rt knows ({PREFIX}*, encoder.* and decoder.*); {_READS}")


def _open_folder(name: str, folder: Path) -> Vae:
    root = folder / VAE if (folder / VAE / "config.json").is_file() else folder
    names = {path.name for path in root.iterdir()}
    if "config.json" not in names:
        raise CheckpointError(f"{name} has no VAE: neither {VAE}/config.json nor config.json; {_READS}")
    refuse_code(names, name)
    return _with_config(name, root / "config.json", choose_weights(root, [""], names, None)[""].files())


def _open_hub(name: str, offline: bool) -> Vae:
    if is_offline(offline):
        return _open_folder(name, download(name, [f"{VAE}/config.json"], offline=True))
    commit, names = look_up(name, None)
    place = f"{VAE}/" if f"{VAE}/config.json" in names else ""
    inside = {each.removeprefix(place) for each in names if each.startswith(place)}
    refuse_code({each for each in inside if "/" not in each}, name)
    root = download(name, [f"{place}config.json", f"{place}*.index*.json"], revision=commit)
    weights = choose_weights(root / place, [""], inside, None)[""].files()
    download(name, [path.relative_to(root).as_posix() for path in weights], revision=commit)
    return _open_folder(name, root)


def _with_config(name: str, path: Path, weights: tuple[Path, ...]) -> Vae:
    config = read_json(path)
    kind = config.get("_class_name", CLASSES[VAE])
    if kind != CLASSES[VAE] or "auto_map" in config:
        raise CheckpointError(f"{name} is of the class {kind}; {_READS}")
    return Vae(name, config, {f"{VAE}/{each.name}": each for each in (path, *weights)}, weights)
