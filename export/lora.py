"""LoRA files: low-rank additions to a checkpoint's weights, merged before anything is traced.

    W' = W + s · (α / r) · B A          B (out, r), A (r, in); s is the user's, α the file's, r where it has none

(Hu et al. 2021, https://arxiv.org/abs/2106.09685). `lora_names.py` says how the tensors are called. α is a tensor of
its own, or it stands in the file's metadata as diffusers writes it: `lora_adapter_metadata`, the `LoraConfig` of PEFT
for each component (https://huggingface.co/docs/peft/package_reference/lora).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rt.errors import CheckpointError, ConfigError
from rt.export.facts import FOLDERS
from rt.export.lora_names import bare, parse_name
from rt.export.weights import PICKLE_SUFFIXES, pickle_error, read_header, read_tensors
from rt.json_file import parse_json
from rt.model import Component

_READS = "rt merges plain LoRAs of the U-Net and the text encoders, in the layouts of diffusers and kohya-ss"
_METADATA = "lora_adapter_metadata"
_CHANGES = ("use_rslora", "use_dora", "alpha_pattern")
"""Of PEFT's settings those that make another formula of it."""


@dataclass(frozen=True, eq=False)
class _Pair:
    """A (r, in, …) and B (out, r, …) of one module, and α / r."""

    down: Tensor
    up: Tensor
    scale: float

    def product(self, shape: tuple[int, ...]) -> Tensor:
        """The addition to a weight of `shape`."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (product * self.scale).reshape(shape)


@dataclass(frozen=True)
class Lora:
    """An opened file.

    Attributes:
        path: Where it is.
        scale: The strength s that the user wants.
    """

    path: Path
    scale: float
    _pairs: Mapping[Component, Mapping[str, _Pair]] = field(repr=False)

    def check(self, component: Component, module: nn.Module) -> None:
        """Raise `CheckpointError` unless all that the file has for `component` fits into `module`."""
        targets = _targets(module)
        for name, pair in self._pairs.get(component, {}).items():
            if name not in targets:
                raise CheckpointError(
                    f"{self.path} changes {name}, which {component.value} has not: it is for another model"
                )
            weight = targets[name].weight
            if (pair.up.shape[0], pair.down[0].numel()) != (weight.shape[0], weight[0].numel()):
                raise CheckpointError(
                    f"{self.path} changes {name} by {list(pair.up.shape)} x {list(pair.down.shape)}, and the "
                    f"model's is {list(weight.shape)}: it is for another model"
                )

    def merge(self, component: Component, module: nn.Module) -> None:
        """Add what the file has for `component` to the float32 weights of `module`, after `check`."""
        targets = _targets(module)
        for name, pair in self._pairs.get(component, {}).items():
            weight = targets[name].weight
            # A new tensor: the old one may be mapped from the checkpoint's file.
            merged = weight.detach() + self.scale * pair.product(tuple(weight.shape))
            targets[name].weight = nn.Parameter(merged, requires_grad=False)


def open_lora(path: Path, scale: float, components: tuple[Component, ...]) -> Lora:
    """Read the LoRA in `path` for a model that has `components`.

    Raises:
        CheckpointError: The file is damaged, is no LoRA, or is for components that the model has not.
        PickleError: The file is in a format that can run code.
    """
    if path.suffix in PICKLE_SUFFIXES:
        raise pickle_error(path)
    if not path.is_file():
        raise CheckpointError(f"there is no LoRA at {path}: --lora takes a .safetensors file")
    _, metadata = read_header(path)
    settings = _settings(metadata, path)
    parts: dict[Component, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in read_tensors([path]).items():
        part = parse_name(name)
        if part is None:
            raise CheckpointError(f"{path} has {name}, which is no part of a plain LoRA; {_READS}")
        if part.component not in components:
            raise CheckpointError(
                f"{path} is for a model with a {part.component.value}, and this one has none"
            )
        parts.setdefault(part.component, {}).setdefault(part.module, {})[part.role] = tensor
    if not parts:
        raise CheckpointError(f"{path} is empty; {_READS}")
    return Lora(
        path,
        scale,
        {
            component: {
                module: _pair(tensors, module, path, settings.get(component))
                for module, tensors in modules.items()
            }
            for component, modules in parts.items()
        },
    )


def parse(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:SCALE`, as the command line has it; the scale is 1 where none is given."""
    file, colon, scale = text.rpartition(":")
    try:
        path, strength = (Path(file), float(scale)) if colon else (Path(text), 1.0)
    except ValueError:  # a colon of the path's own
        path, strength = Path(text), 1.0
    if not -100 < strength < 100:
        raise ConfigError(f"the scale of the LoRA {path} is {strength:g}: expected about 0 to 1")
    return path, strength


def _settings(metadata: Mapping[str, str], path: Path) -> dict[Component, float]:
    """α of each component of which the metadata say it."""
    try:
        said: dict[str, Any] = dict(parse_json(metadata.get(_METADATA, "{}").encode()))
        alphas: dict[Component, float] = {}
        for component, folder in FOLDERS.items():
            own = {
                key: said[f"{folder}.{key}"] for key in ("lora_alpha", *_CHANGES) if f"{folder}.{key}" in said
            }
            if changes := [key for key in _CHANGES if own.get(key)]:
                raise CheckpointError(f"{path} has {changes[0]}, which is no plain LoRA; {_READS}")
            if "lora_alpha" in own:
                alphas[component] = float(own["lora_alpha"])
    except (ValueError, TypeError, OverflowError):
        raise CheckpointError(f"{path} has bad {_METADATA}: download it again") from None
    return alphas


def _pair(tensors: Mapping[str, Tensor], module: str, path: Path, alpha: float | None) -> _Pair:
    if not {"down", "up"} <= tensors.keys():
        raise CheckpointError(f"{path} has only half of {module}: it is damaged, download it again")
    down, up = tensors["down"], tensors["up"]
    rank = down.shape[0]
    if down.ndim < 2 or up.ndim < 2 or rank == 0 or up.flatten(1).shape[1] != rank:
        raise CheckpointError(
            f"{path}: {list(up.shape)} x {list(down.shape)} of {module} is no product: download it again"
        )
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1:
            raise CheckpointError(f"{path}: α of {module} is no single number: download it again")
        alpha = tensors["alpha"].item()
    return _Pair(down, up, 1.0 if alpha is None else alpha / rank)


def _targets(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """What a LoRA can change, by its name without punctuation."""
    return {
        bare(name): part for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)
    }
