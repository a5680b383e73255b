"""Names of tensors: what older libraries called them, and what a file has beside the weights of a network."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping

from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

logger = logging.getLogger(__name__)

# As (old, new) pieces. transformers dropped the prefix of CLIPTextModel in 5.6; diffusers renamed the attention of
# the autoencoder in 0.17.
_RENAMED = (
    ("text_model.", ""),
    (".query.", ".to_q."),
    (".key.", ".to_k."),
    (".value.", ".to_v."),
    (".proj_attn.", ".to_out.0."),
)

# Constants that were once saved with the weights, and what of a whole CLIPModel no text encoder has.
_CLIP = r"(?:.*\.)?position_ids|logit_scale|logit_bias|vision_model\..*|visual\..*|visual_projection(?:\..*)?|attn_mask"

# By class, what libraries pass over when they load it, as a pattern of the whole canonical name.
_IGNORED: Mapping[type[nn.Module], re.Pattern[str]] = {
    CLIPTextModel: re.compile(rf"{_CLIP}|text_projection(?:\..*)?"),
    CLIPTextModelWithProjection: re.compile(_CLIP),
    AutoencoderKL: re.compile(r"loss\..*|model_ema\..*"),
}
# Also by a LoRA's names, which have no punctuation.
_LAYER = re.compile(r"encoder[._]layers[._](\d+)[._].*")


def canonical(name: str) -> str:
    """The name that today's libraries give the tensor."""
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name


def ignored(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of `names` that loading passes over, as transformers and diffusers do.

    They are what belongs to another half of CLIP, constants, and layers of a text encoder beyond the number that its
    config says: people lower `num_hidden_layers` to draw with an earlier layer.
    """
    pattern = _IGNORED.get(type(module))
    return [
        name
        for name in names
        if (pattern is not None and pattern.fullmatch(canonical(name))) or is_surplus(module, name)
    ]


def is_surplus(module: nn.Module, name: str) -> bool:
    """Whether `name` belongs to a layer of a text encoder that its config leaves out."""
    layer = _LAYER.fullmatch(canonical(name))
    if layer is None or not isinstance(module, CLIPTextModel | CLIPTextModelWithProjection):
        return False
    layers: int = module.config.num_hidden_layers
    return int(layer[1]) >= layers


def say_surplus(module: nn.Module, names: Iterable[str], where: str) -> None:
    """Warn of those of `names` that `is_surplus` says are left out."""
    if surplus := [name for name in names if is_surplus(module, name)]:
        logger.warning("%s: left out, since the config says fewer layers: %s", where, summary(surplus))


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of `tensors` whose names begin with `prefix`."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """`part` by the names that follow `prefix`."""
    return {name.removeprefix(prefix): tensor for name, tensor in part(tensors, prefix).items()}


def count(names: Iterable[str], prefix: str) -> int:
    """How many different numbers follow `prefix`."""
    return len({name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)})


def summary(names: list[str]) -> str:
    """The first of `names` and how many more there are."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
