"""LoRA files: low-rank additions to a checkpoint's weights, merged before anything is traced.

    W' = W + s · (α / r) · B A          B (out, r), A (r, in); s is the user's, α the file's, r where it has none

(Hu et al. 2021, https://arxiv.org/abs/2106.09685). `lora_names.py` says how the tensors are called. α is a tensor of
its own, or it stands in PEFT's settings, see `lora_settings.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from rt.checkpoint_file import read_json
from rt.errors import CheckpointError, ConfigError
from rt.export.lora_names import bare, is_pefts, parse_name
from rt.export.lora_settings import Settings, from_metadata
from rt.export.names import is_surplus, say_surplus
from rt.export.weights import PICKLE_SUFFIXES, pickle_error, read_header, read_tensors
from rt.model import Component

logger = logging.getLogger(__name__)

_READS = (
    "rt merges plain LoRAs of the U-Net and the text encoders, in the layouts of diffusers, PEFT and kohya-ss"
)
_IN_FOLDER = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""What PEFT's and diffusers' ways of saving call the file."""
_CONFIG = "adapter_config.json"
_EMBEDDING = "bundle_emb."


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
        config: PEFT's settings that were read, or None.
    """

    path: Path
    scale: float
    config: Path | None
    _pairs: Mapping[Component, Mapping[str, _Pair]] = field(repr=False)

    @property
    def name(self) -> str:
        """Of the file, or of its folder where all such files are called the same."""
        return self.path.resolve().parent.name if self.path.name in _IN_FOLDER else self.path.name

    def check(self, component: Component, module: nn.Module) -> None:
        """Raise `CheckpointError` unless all that the file has for `component` fits into `module`."""
        targets = _targets(module)
        pairs = self._pairs.get(component, {})
        say_surplus(module, pairs, f"{self.path}, {component.value}")
        for name, pair in pairs.items():
            if is_surplus(module, name):
                continue
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
            if is_surplus(module, name):
                continue
            weight = targets[name].weight
            # A new tensor: the old one may be mapped from the checkpoint's file.
            merged = weight.detach() + self.scale * pair.product(tuple(weight.shape))
            targets[name].weight = nn.Parameter(merged, requires_grad=False)


def open_lora(path: Path, scale: float, components: tuple[Component, ...]) -> Lora:
    """Read the LoRA in `path`, a file or the folder that PEFT or diffusers wrote, for a model that has `components`.

    Raises:
        CheckpointError: The file is damaged, is no LoRA, or is for components that the model has not.
        PickleError: The file is in a format that can run code.
    """
    path = _file(path)
    _, metadata = read_header(path)
    tensors = read_tensors([path])
    if embeddings := sorted({name.split(".")[1] for name in tensors if name.startswith(_EMBEDDING)}):
        logger.warning("%s has embeddings, which are left out: %s", path, ", ".join(embeddings))
    settings = from_metadata(metadata, str(path))
    config, text = None, Component.TEXT_ENCODER
    if path.name == _IN_FOLDER[0] or any(map(is_pefts, tensors)):
        config = path.with_name(_CONFIG) if path.with_name(_CONFIG).is_file() else None
        if config is None:
            logger.warning("%s has no %s beside it, which has its α: 1 is taken for α / r", path, _CONFIG)
        else:
            said = read_json(config)
            settings = dict.fromkeys(components, Settings.from_json(said, str(path), _CONFIG))
            text = _text_encoder(said, path)
    parts: dict[Component, dict[str, dict[str, Tensor]]] = {}
    paths: dict[tuple[Component, str], str] = {}
    for name, tensor in tensors.items():
        if name.startswith(_EMBEDDING):
            continue
        part = parse_name(name, text)
        if part is None:
            raise CheckpointError(f"{path} has {name}, which is no part of a plain LoRA; {_READS}")
        if part.component not in components:
            raise CheckpointError(
                f"{path} is for a model with a {part.component.value}, and this one has none"
            )
        roles = parts.setdefault(part.component, {}).setdefault(part.module, {})
        if part.role in roles:
            raise CheckpointError(f"{path} has two LoRAs in one, for {part.path}: save each in a file")
        roles[part.role] = tensor
        paths[part.component, part.module] = part.path
    if not parts:
        raise CheckpointError(f"{path} is empty; {_READS}")
    pairs = {
        component: {
            module: _pair(roles, paths[component, module], path, settings.get(component))
            for module, roles in modules.items()
        }
        for component, modules in parts.items()
    }
    return Lora(path, scale, config, pairs)


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


def _file(path: Path) -> Path:
    """Of a folder the one file in it that is a LoRA."""
    if path.is_dir():
        names = [name for name in _IN_FOLDER if (path / name).is_file()]
        if not names:
            if pickles := sorted(file for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES):
                raise pickle_error(pickles[0])
            below = sorted(file.parent.name for file in path.glob(f"*/{_IN_FOLDER[0]}"))
            hint = f"; name one of its folders: {', '.join(below)}" if below else ""
            raise CheckpointError(f"{path} has neither {' nor '.join(_IN_FOLDER)}{hint}")
        return path / names[0]
    if path.suffix in PICKLE_SUFFIXES:
        raise pickle_error(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no LoRA at {path}: --lora takes a .safetensors file or a folder with one"
        )
    return path


def _text_encoder(config: Mapping[str, object], path: Path) -> Component:
    """Which one PEFT made the file of; in it their names are the same."""
    base = config.get("auto_mapping")
    named = isinstance(base, dict) and base.get("base_model_class") == "CLIPTextModelWithProjection"
    second = Component.TEXT_ENCODER_2
    return second if named or path.resolve().parent.name == second.value else Component.TEXT_ENCODER


def _pair(tensors: Mapping[str, Tensor], module: str, path: Path, settings: Settings | None) -> _Pair:
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
        return _Pair(down, up, tensors["alpha"].item() / rank)
    return _Pair(down, up, 1.0 if settings is None else settings.scale(module, rank))


def _targets(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """What a LoRA can change, by its name without punctuation."""
    return {
        bare(name): part for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)
    }
