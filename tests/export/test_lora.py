"""LoRA files: merged as diffusers merges them, in every layout; what does not fit is refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from rt.errors import CheckpointError, ConfigError, PickleError
from rt.export.architectures import Architecture, clip, unet, vae
from rt.export.checkpoint import Checkpoint, open_checkpoint
from rt.export.lora import parse
from rt.model import Component, Family

RANK, ALPHA = 3, 1.5
UNET = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "linear",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0": "linear",
    "down_blocks.0.attentions.0.proj_in": "1x1",
    "down_blocks.0.resnets.0.conv1": "3x3",
}
TEXT = {"text_model.encoder.layers.0.self_attn.q_proj": "linear"}


def pairs(checkpoint: Path) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Random A and B for each target, by component and module."""
    opened = open_checkpoint(str(checkpoint))
    drawn = {}
    for part, component, modules in (
        ("unet", Component.UNET, UNET),
        ("text_encoder", Component.TEXT_ENCODER, TEXT),
    ):
        network = opened.load(component)
        for name in modules:
            own = name if part == "unet" else name.removeprefix("text_model.")
            out, *into = network.get_submodule(own).weight.shape
            down, up = torch.randn(RANK, *into) * 0.1, torch.randn(out, RANK, *[1] * (len(into) - 1)) * 0.1
            drawn[part, name] = (down, up)
    return drawn


def write(path: Path, layout: str, drawn: dict[tuple[str, str], tuple[Tensor, Tensor]]) -> Path:
    tensors = {}
    for (part, name), (down, up) in drawn.items():
        if layout == "kohya":
            stem = {"unet": "lora_unet", "text_encoder": "lora_te"}[part] + "_" + name.replace(".", "_")
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
        elif layout == "processor" and ".attn" in name:
            stem = f"{part}.{name.removesuffix('.0').replace('.to_', '.processor.to_')}_lora"
            tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
        else:
            a, b = {
                "peft": ("lora_A", "lora_B"),
                "old": ("lora.down", "lora.up"),
                "processor": ("lora_linear_layer.down", "lora_linear_layer.up"),
                "bare": ("lora_A", "lora_B"),
            }[layout]
            stem = name if layout == "bare" and part == "unet" else f"{part}.{name}"
            tensors |= {f"{stem}.{a}.weight": down, f"{stem}.{b}.weight": up}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("layout", ["peft", "old", "processor", "bare", "kohya"])
def test_every_layout_is_merged(folder: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    root = folder()
    drawn = pairs(root)
    file = write(tmp_path / "style.safetensors", layout, drawn)
    merged, plain = open_checkpoint(str(root), loras=[(file, 0.5)]), open_checkpoint(str(root))
    strength = 0.5 * (ALPHA / RANK if layout == "kohya" else 1.0)
    for component, part in ((Component.UNET, "unet"), (Component.TEXT_ENCODER, "text_encoder")):
        before, after = plain.load(component).state_dict(), merged.load(component).state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        expected = set()
        for (owner, module), (down, up) in drawn.items():
            if owner == part:
                name = module.removeprefix("text_model.") + ".weight"
                expected.add(name)
                addition = torch.einsum("or,r...->o...", up.flatten(1), down)
                torch.testing.assert_close(
                    after[name] - before[name], strength * addition, atol=1e-6, rtol=1e-4
                )
        assert changed == expected


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_same_as_diffusers(demo_model: Path, tmp_path: Path, layout: str) -> None:
    drawn = {}
    pipe = StableDiffusionPipeline.from_pretrained(demo_model, safety_checker=None, torch_dtype=torch.float32)
    for name, module in pipe.unet.named_modules():
        if name.endswith(("to_q", "to_v", "to_out.0")):
            out, into = module.weight.shape
            drawn["unet", name] = (torch.randn(RANK, into) * 0.05, torch.randn(out, RANK) * 0.05)
    file = write(tmp_path / "style.safetensors", layout, drawn)
    check_same(pipe, file, open_checkpoint(str(demo_model), loras=[(file, 0.7)]))


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 1},
        {"lora_alpha": 7.5, "use_rslora": True},
        {"lora_alpha": 4, "alpha_pattern": {"attn2.to_q": 9, "conv1": 2}, "rank_pattern": {"conv1": 5}},
    ],
)
def test_settings_in_the_metadata(demo_model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """As diffusers writes them, and reads them."""
    pipe = StableDiffusionPipeline.from_pretrained(demo_model, safety_checker=None, torch_dtype=torch.float32)
    targets = ["to_q", "conv1"]
    pipe.unet.add_adapter(LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False, **settings))
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        weight_name="style.safetensors",
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )
    file = tmp_path / "style.safetensors"
    fresh = StableDiffusionPipeline.from_pretrained(
        demo_model, safety_checker=None, torch_dtype=torch.float32
    )
    check_same(fresh, file, open_checkpoint(str(demo_model), loras=[(file, 0.7)]))


def test_original_names_of_xl(write_folder: Callable[..., None], tmp_path: Path) -> None:
    """kohya-ss names XL's blocks as the original code does; all that such files are known to change, and more."""
    architecture = Architecture(
        Family.SDXL,
        unet(
            (32, 64),
            192,
            8,
            [1, 2],
            depths=(0, 2),
            use_linear_projection=True,
            layers_per_block=2,
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=96 + 6 * 32,
        ),
        vae((32, 64), 16, layers=1),
        (
            clip(64, 2, 1, act="quick_gelu", vocab=514, tokens=12),
            clip(128, 3, 2, act="gelu", vocab=514, tokens=12, projection=96),
        ),
    )
    write_folder(tmp_path / "model", architecture)
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.float32)
    tensors = {}
    for encoder, stem in ((pipe.unet, "unet"), (pipe.text_encoder, "te1"), (pipe.text_encoder_2, "te2")):
        for name, module in encoder.named_modules():
            if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d) or name == "text_projection":
                continue
            out, *into = module.weight.shape
            shape = (out, RANK, *[1] * (len(into) - 1))
            own = original_name(name) if stem == "unet" else f"text_model_{name.removeprefix('text_model.')}"
            if own is not None:
                key = f"lora_{stem}_{own.replace('.', '_')}"
                tensors[f"{key}.lora_down.weight"] = torch.randn(RANK, *into) * 0.1
                tensors[f"{key}.lora_up.weight"] = torch.randn(shape) * 0.1
                tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    file = tmp_path / "style.safetensors"
    save_file(tensors, file)
    assert any("output_blocks_2_2_conv" in name for name in tensors)
    check_same(pipe, file, open_checkpoint(str(tmp_path / "model"), loras=[(file, 0.7)]))


def original_name(name: str) -> str | None:
    """Of a module of a U-Net with two levels of two layers, the second with attention; written out by hand."""
    blocks = {
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.resnets.1": "input_blocks.2.0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.resnets.0": "input_blocks.4.0",
        "down_blocks.1.attentions.0": "input_blocks.4.1",
        "down_blocks.1.resnets.1": "input_blocks.5.0",
        "down_blocks.1.attentions.1": "input_blocks.5.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
        "up_blocks.0.resnets.2": "output_blocks.2.0",
        "up_blocks.0.attentions.2": "output_blocks.2.1",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.resnets.0": "output_blocks.3.0",
        "up_blocks.1.resnets.1": "output_blocks.4.0",
        "up_blocks.1.resnets.2": "output_blocks.5.0",
    }
    layers = {
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    for block, own in blocks.items():
        if name == block or name.startswith(f"{block}."):
            rest = name.removeprefix(block).removeprefix(".")
            return f"{own}.{layers.get(rest, rest)}".rstrip(".")
    return None


def check_same(pipe: Any, file: Path, merged: Checkpoint) -> None:
    """What `pipe` is after it has merged `file` at 0.7."""
    pipe.load_lora_weights(file)
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    for component, network in (
        (Component.UNET, pipe.unet),
        (Component.TEXT_ENCODER, pipe.text_encoder),
        (Component.TEXT_ENCODER_2, getattr(pipe, "text_encoder_2", None)),
    ):
        if network is not None:
            expected, found = network.state_dict(), merged.load(component).state_dict()
            assert expected.keys() == found.keys()
            assert max((found[name] - expected[name]).abs().max().item() for name in expected) < 1e-6


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('{"unet.use_dora": true}', "has use_dora in its lora_adapter_metadata"),
        ('{"unet.peft_type": "LOHA"}', "has a LOHA in its lora_adapter_metadata"),
        ('{"unet.init_lora_weights": "pissa_niter_16"}', "which changes the model's own weights"),
        ('{"unet.alpha_pattern": {"(a+)+": 4}}', "a group that repeats: refused"),
        ('{"unet.alpha_pattern": {"(": 4}}', "bad lora_adapter_metadata"),
        ('{"unet.alpha_pattern": [4]}', "bad lora_adapter_metadata"),
        ('{"unet.lora_alpha": NaN}', "bad lora_adapter_metadata"),
        ('{"unet.lora_alpha": "much"}', "bad lora_adapter_metadata"),
        ("[1]", "bad lora_adapter_metadata"),
    ],
)
def test_metadata_that_mean_another_formula(
    folder: Callable[..., Path], tmp_path: Path, said: str, message: str
) -> None:
    file = tmp_path / "style.safetensors"
    save_file({f"{A}.lora_A.weight": torch.randn(4, 32)}, file, metadata={"lora_adapter_metadata": said})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder()), loras=[(file, 1.0)])


def test_several_add_up(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder()
    file = write(tmp_path / "style.safetensors", "peft", pairs(root))
    twice = open_checkpoint(str(root), loras=[(file, 0.5), (file, 0.25)]).load(Component.UNET)
    once = open_checkpoint(str(root), loras=[(file, 0.75)]).load(Component.UNET)
    for a, b in zip(twice.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_checkpoint_on_disk_stays_as_it_was(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder()
    weights = root / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    open_checkpoint(str(root), loras=[(write(tmp_path / "a.safetensors", "peft", pairs(root)), 1.0)]).load(
        Component.UNET
    )
    assert weights.read_bytes() == before


A = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "is empty"),
        ({"unet.conv_in.weight": (4, 4)}, "no part of a plain LoRA"),
        ({f"{A}.hada_w1_a": (4, 4)}, "no part of a plain LoRA"),
        ({"transformer.x.lora_A.weight": (4, 4)}, "no part of a plain LoRA"),
        ({"lora_te2_x.lora_down.weight": (4, 4)}, "text_encoder_2, and this one has none"),
        ({f"{A}.lora_A.weight": (4, 32)}, "only half of"),
        ({f"{A}.lora_A.weight": (4, 32), f"{A}.lora_B.weight": (32, 5)}, "is no product"),
        ({f"{A}.lora_A.weight": (0, 32), f"{A}.lora_B.weight": (32, 0)}, "is no product"),
        (
            {f"{A}.lora_A.weight": (4, 32), f"{A}.lora_B.weight": (32, 4), f"{A}.alpha": (2,)},
            "no single number",
        ),
        ({f"{A}.lora_A.weight": (4, 31), f"{A}.lora_B.weight": (32, 4)}, r"the model's is \[32, 32\]"),
        ({"unet.x.lora_A.weight": (4, 8), "unet.x.lora_B.weight": (8, 4)}, "which unet has not"),
    ],
)
def test_what_does_not_fit_is_refused(
    folder: Callable[..., Path], tmp_path: Path, tensors: dict[str, tuple[int, ...]], message: str
) -> None:
    file = tmp_path / "bad.safetensors"
    save_file({name: torch.randn(shape) for name, shape in tensors.items()}, file)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(str(folder(Family.SD1)), loras=[(file, 1.0)])
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_pickles_and_missing_files_are_refused(folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(PickleError):
        open_checkpoint(str(folder()), loras=[(tmp_path / "style.pt", 1.0)])
    with pytest.raises(CheckpointError, match="there is no LoRA at"):
        open_checkpoint(str(tmp_path / "sd1"), loras=[(tmp_path / "none.safetensors", 1.0)])


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.7", "a.safetensors", 0.7),
        ("c:/a", "c:/a", 1.0),
    ],
)
def test_the_command_line_s_spelling(text: str, path: str, scale: float) -> None:
    assert parse(text) == (Path(path), scale)


@pytest.mark.parametrize("text", ["a:nan", "a:inf", "a:1e9"])
def test_a_scale_without_meaning(text: str) -> None:
    with pytest.raises(ConfigError, match="scale of the LoRA"):
        parse(text)
