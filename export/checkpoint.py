"""Checkpoints: what `rt` can compile, opened from wherever the user has it.

folder · hub id · single file · synthetic  →  Checkpoint (facts, configs, files)  →  load(component)
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from rt.errors import ConfigError, nearest
from rt.export.facts import FOLDERS, VAE, read_spec
from rt.export.folder import open_folder
from rt.export.hub import open_hub
from rt.export.lora import Lora, open_lora
from rt.export.names import ignored, is_surplus, say_surplus, summary
from rt.export.single_file import open_single_file
from rt.export.source import SYNTHETIC, Kind, Source
from rt.export.synthetic import open_synthetic
from rt.export.vae import open_vae, replace_vae
from rt.export.weights import build_empty, check, fill
from rt.model import Component, ModelSpec
from rt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Checkpoint:
    """A model to compile, with its weights still on disk.

    Attributes:
        name: What the user typed.
        kind: Where it comes from.
        revision: The commit hash on the hub, or None.
        files: Every file that shapes the result, by its name relative to the checkpoint.
        spec: The facts that running the model needs.
        configs: Of each component by its folder's name in diffusers, `model_index` and `scheduler`.
        licence: Of the weights: `license:` of the README's front matter, or a licence file's name.
        vae: The name of the VAE that takes the place of its own, or None.
        loras: Merged into the weights as they are loaded, in this order.
    """

    name: str
    kind: Kind
    revision: str | None
    files: Mapping[str, Path] = field(repr=False)
    spec: ModelSpec
    configs: Mapping[str, Mapping[str, Any]] = field(repr=False)
    licence: str | None
    source: Source = field(repr=False)
    vae: str | None = None
    loras: tuple[Lora, ...] = ()

    @property
    def components(self) -> tuple[Component, ...]:
        """The text encoders in order, the U-Net, and as much of the VAE as the model needs."""
        encoder = (Component.VAE_ENCODER,) if self.spec.inpainting else ()
        return (*self.spec.text_encoders, Component.UNET, *encoder, Component.VAE_DECODER)

    def check(self) -> None:
        """Raise `CheckpointError` unless the weights' headers fit the configs and each tokenizer opens."""
        for component in {FOLDERS[component]: component for component in self.components}.values():
            headers, where = self.source.headers(component), self._where(component)
            module = build_empty(component, self._config(component), headers)
            check(module, headers, where)
            _say_ignored(module, headers, where)
            for lora in self.loras:
                lora.check(component, module)
        for encoder in self.spec.text_encoders:
            self.tokenizer(encoder)

    def load(self, component: Component) -> nn.Module:
        """The network in float32, eval mode, no gradients; for either half of the VAE the whole `AutoencoderKL`."""
        module = build_empty(component, self._config(component))
        fill(module, self.source.tensors(component), self._where(component))
        for lora in self.loras:
            lora.merge(component, module)
        return module

    def tokenizer(self, component: Component) -> Tokenizer:
        """The tokenizer of a text encoder."""
        return self.source.tokenizer(component, self.spec.max_tokens)

    def _config(self, component: Component) -> Mapping[str, Any]:
        return self.configs[FOLDERS[component]]

    def _where(self, component: Component) -> str:
        folder = FOLDERS[component]
        return f"{self.vae if self.vae and folder == VAE else self.name}, {folder}"


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    offline: bool = False,
    tokenizer: str | None = None,
    prediction_type: str | None = None,
    vae: str | None = None,
    loras: Sequence[tuple[Path, float]] = (),
) -> Checkpoint:
    """Read all facts of a checkpoint and check the headers of its weights; the weights stay on disk.

    Args:
        model: A diffusers folder, a hub id `org/name`, a single `.safetensors` file in the original key
            layout, or `synthetic:NAME` (real shapes, random weights).
        revision: Branch, tag or commit of a hub repository.
        variant: Of a folder's or repository's weights, e.g. `fp16`.
        offline: Use the hub's cache only.
        tokenizer: Folder or hub id with the CLIP vocabulary of a single file, which holds none.
        prediction_type: What the U-Net predicts, where the checkpoint does not say so or says it wrongly.
        vae: A folder, hub id or `.safetensors` file of an autoencoder to take instead of the checkpoint's own.
        loras: Files of low-rank additions to the weights, and how much of each.

    Raises:
        ConfigError: An argument has no meaning for this kind of checkpoint.
        PickleError: The weights are in a format that can run code.
        CheckpointError: The checkpoint cannot be read, is damaged, or is of a family that rt does not run.
    """
    kind = Kind.of(model)
    _refuse_unused(kind, revision=revision, variant=variant, tokenizer=tokenizer)
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise ConfigError(
            f"there is no prediction type {prediction_type!r}{nearest(prediction_type, PREDICTION_TYPES)}; "
            f"there are: {', '.join(PREDICTION_TYPES)}"
        )
    replacement = None if vae is None else open_vae(vae, offline)
    elsewhere = () if replacement is None else (VAE,)
    source: Source
    if kind is Kind.FOLDER:
        source = open_folder(Path(model), variant, elsewhere)
    elif kind is Kind.HUB:
        source = open_hub(model, revision, variant, offline, elsewhere)
    elif kind is Kind.SINGLE_FILE:
        source = open_single_file(Path(model), tokenizer, prediction_type, offline, elsewhere)
    else:
        source = open_synthetic(model.removeprefix(SYNTHETIC))
    if replacement is not None:
        source = replace_vae(source, replacement, model)

    spec = read_spec(source.configs, model)
    if prediction_type is not None and kind is not Kind.SINGLE_FILE:  # which has it in its config
        spec = replace(spec, scheduler={**spec.scheduler, "prediction_type": prediction_type})
    checkpoint = Checkpoint(
        name=model,
        kind=kind,
        revision=source.revision,
        files=source.files,
        spec=spec,
        configs={**source.configs, "scheduler": spec.scheduler},
        licence=source.licence,
        source=source,
        vae=vae,
    )
    opened = tuple(open_lora(path, scale, checkpoint.components) for path, scale in loras)
    settings = {
        f"lora-{i}/{lora.config.name}": lora.config for i, lora in enumerate(opened, 1) if lora.config
    }
    checkpoint = replace(checkpoint, loras=opened, files={**checkpoint.files, **settings})
    checkpoint.check()
    return checkpoint


def _say_ignored(module: nn.Module, names: Iterable[str], where: str) -> None:
    more = ignored(module, names)
    say_surplus(module, more, where)
    if rest := [name for name in more if not is_surplus(module, name)]:
        logger.info("%s: left out, since no %s has it: %s", where, type(module).__name__, summary(rest))


# The options that only some kinds of checkpoint can obey.
_OPTIONS = {
    "revision": {Kind.HUB},
    "variant": {Kind.FOLDER, Kind.HUB},
    "tokenizer": {Kind.SINGLE_FILE},
}


def _refuse_unused(kind: Kind, **options: str | None) -> None:
    for name, value in options.items():
        if value is not None and kind not in _OPTIONS[name]:
            kinds = " or ".join(sorted(valid.value for valid in _OPTIONS[name])).replace("_", " ")
            raise ConfigError(
                f"{name} {value!r} has no meaning for a {kind.value.replace('_', ' ')}, only for a {kinds}"
            )
