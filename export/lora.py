"""LoRA files: low-rank additions to a checkpoint's weights, merged before anything is traced.

    W' = W + s · (α / r) · B A          B (out, r), A (r, in); s is the user's, α the file's, r where it has none

(Hu et al. 2021, https://arxiv.org/abs/2106.09685). Three ways of naming the tensors are in use:

    unet.mid_block.….to_q.lora_A.weight             A, lora_B: diffusers with PEFT, no α
    unet.mid_block.….to_q.lora.down.weight          A, lora.up: diffusers before PEFT, no α
    lora_unet_mid_block_…_to_q.lora_down.weight     A, lora_up, and α in ….alpha: kohya-ss

They differ in punctuation only, so a name is taken apart at its tensor's suffix and compared without any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from rt.errors import CheckpointError, ConfigError
from rt.export.weights import PICKLE_SUFFIXES, pickle_error, read_header, read_tensors
from rt.model import Component

_PREFIXES = {
    Component.TEXT_ENCODER_2: ("text_encoder_2.", "lora_te2_"),
    Component.TEXT_ENCODER: ("text_encoder.", "lora_te1_", "lora_te_"),
    Component.UNET: ("unet.", "lora_unet_"),
}
_NAME = re.compile(
    r"(?P<module>.+?)\.(?:(?P<down>lora_A|lora\.down|lora_down)|(?P<up>lora_B|lora\.up|lora_up))\.weight"
    r"|(?P<scaled>.+)\.alpha"
)
_READS = "rt merges plain LoRAs of the U-Net and the text encoders, in the layouts of diffusers and kohya-ss"


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
    read_header(path)
    parts: dict[Component, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in read_tensors([path]).items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{path} has {name}, which is no part of a plain LoRA; {_READS}")
        component, module = _split(match["module"] or match["scaled"], path)
        if component not in components:
            raise CheckpointError(f"{path} is for a model with a {component.value}, and this one has none")
        role = "down" if match["down"] else "up" if match["up"] else "alpha"
        parts.setdefault(component, {}).setdefault(module, {})[role] = tensor
    if not parts:
        raise CheckpointError(f"{path} is empty; {_READS}")
    return Lora(
        path,
        scale,
        {
            component: {module: _pair(tensors, module, path) for module, tensors in modules.items()}
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


def _split(name: str, path: Path) -> tuple[Component, str]:
    for component, prefixes in _PREFIXES.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                return component, _bare(name.removeprefix(prefix))
    raise CheckpointError(f"{path} has {name}, which is of no component of Stable Diffusion; {_READS}")


def _pair(tensors: Mapping[str, Tensor], module: str, path: Path) -> _Pair:
    if not {"down", "up"} <= tensors.keys():
        raise CheckpointError(f"{path} has only half of {module}: it is damaged, download it again")
    down, up = tensors["down"], tensors["up"]
    rank = down.shape[0]
    if down.ndim < 2 or up.ndim < 2 or up.flatten(1).shape[1] != rank:
        raise CheckpointError(
            f"{path}: {list(up.shape)} x {list(down.shape)} of {module} is no product: download it again"
        )
    return _Pair(down, up, float(tensors["alpha"]) / rank if "alpha" in tensors else 1.0)


def _targets(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """What a LoRA can change, by its name without punctuation."""
    return {
        _bare(name): part for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)
    }


def _bare(name: str) -> str:
    """Without punctuation, and without the prefix that transformers' text encoders had until 5.6."""
    return name.replace(".", "_").removeprefix("text_model_")
