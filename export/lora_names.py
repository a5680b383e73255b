"""What the tensors of a LoRA file are for, by their names.

    unet.mid_block.….to_q.lora_A.weight                  A, lora_B: diffusers with PEFT
    unet.mid_block.….to_q.lora.down.weight               A, lora.up: diffusers before PEFT
    unet.mid_block.….processor.to_q_lora.down.weight     A, up: diffusers before that; text encoders: lora_linear_layer
    lora_unet_mid_block_…_to_q.lora_down.weight          A, lora_up, and α in ….alpha: kohya-ss
    base_model.model.mid_block.….to_q.lora_A.weight      A, lora_B: PEFT, of one network; also after or before `unet.`
    ….lora_A.default.weight                              PEFT with the name of the adapter

The prefix `unet.` may be missing. For XL, kohya-ss names the U-Net's blocks as Stability-AI's code does:
input_blocks_4_1_… is down_blocks_1_attentions_0_…. But for that, the ways differ in punctuation only, so a module's
name is compared without any.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from rt.model import Component

_PREFIXES = {
    "text_encoder_2.": Component.TEXT_ENCODER_2,
    "lora_te2_": Component.TEXT_ENCODER_2,
    "text_encoder.": Component.TEXT_ENCODER,
    "lora_te1_": Component.TEXT_ENCODER,
    "lora_te_": Component.TEXT_ENCODER,
    "unet.": Component.UNET,
    "lora_unet_": Component.UNET,
}
_PEFT = "base_model.model."
_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
"""How names of the U-Net's modules begin where a file has no prefix."""
_TEXT = ("text_model.", "encoder.layers.", "text_projection")
"""How those of a text encoder begin in a file of PEFT's, which is for one network."""

_NAME = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<down>lora_A|lora\.down|lora_down|lora_linear_layer\.down)|"
    r"(?P<up>lora_B|lora\.up|lora_up|lora_linear_layer\.up))(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|(?P<scaled>.+)\.alpha"
)
_PROCESSOR = re.compile(r"\.processor\.(to_\w+)_lora\.")

_LAYERS = 2
"""Residual layers a block, in every published U-Net of the family; the original numbering counts through blocks."""
_ORIGINAL_BLOCK = re.compile(r"(input|middle|output)_blocks?_(\d+)_(?:(\d+)_)?(.+)")
_ORIGINAL_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ORIGINAL = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_2": "conv_out",
}


@dataclass(frozen=True)
class Part:
    """One tensor's part in a LoRA: A is down, B is up.

    Attributes:
        component: Whose weights it changes.
        module: Name of the module without punctuation, see `bare`.
        path: The same as the file has it.
        role: Of the tensor.
    """

    component: Component
    module: str
    path: str
    role: Literal["down", "up", "alpha"]


def is_pefts(name: str) -> bool:
    """Whether PEFT gave the tensor its name, which leaves α in a file of its own."""
    return _PEFT in name


def parse_name(name: str, text: Component) -> Part | None:
    """What the tensor `name` is for, or None where it is no part of a plain LoRA of this family.

    Args:
        name: In one of the layouts of this module.
        text: Which text encoder a file is for that PEFT made of one.
    """
    match = _NAME.fullmatch(_PROCESSOR.sub(r".\1.lora.", name).replace(".to_out.lora.", ".to_out.0.lora."))
    if match is None:
        return None
    role: Literal["down", "up", "alpha"] = "down" if match["down"] else "up" if match["up"] else "alpha"
    path: str = match["module"] or match["scaled"]
    one_network = path.startswith(_PEFT)
    path = path.removeprefix(_PEFT)
    for prefix, component in _PREFIXES.items():
        if path.startswith(prefix):
            path = path.removeprefix(prefix).removeprefix(_PEFT)
            module = bare(path)
            return Part(component, _current(module) if component is Component.UNET else module, path, role)
    if one_network and path.startswith(_TEXT):
        return Part(text, bare(path), path, role)
    return Part(Component.UNET, bare(path), path, role) if one_network or path.startswith(_BLOCKS) else None


def bare(name: str) -> str:
    """Without punctuation, and without the prefix that transformers' text encoders had until 5.6."""
    return name.replace(".", "_").removeprefix("text_model_")


def _current(module: str) -> str:
    """diffusers' name of a module of the U-Net that may have Stability-AI's."""
    if module in _ORIGINAL:
        return _ORIGINAL[module]
    match = _ORIGINAL_BLOCK.fullmatch(module)
    if match is None:
        return module
    side, number, place, rest = match[1], int(match[2]), match[3], match[4]
    if side == "middle":
        layer, attention = divmod(number, 2)  # residual, attention, residual
        where = "mid_block"
    else:
        block, layer = divmod(number - (side == "input"), _LAYERS + 1)
        where = f"{'down' if side == 'input' else 'up'}_blocks_{block}"
        attention = place == "1"
        if rest == "op":
            return f"{where}_downsamplers_0_conv"
        if rest == "conv":
            return f"{where}_upsamplers_0_conv"
    if attention:
        return f"{where}_attentions_{layer}_{rest}"
    return f"{where}_resnets_{layer}_{_ORIGINAL_RESNET.get(rest, rest)}"
