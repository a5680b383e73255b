"""LoRAs as PEFT saves them: its names and its settings, against what PEFT itself merges."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rt.errors import CheckpointError, PickleError
from rt.export.checkpoint import open_checkpoint
from rt.export.lora_settings import Settings
from rt.model import Component, Family

UNET, TEXT, SECOND = Component.UNET, Component.TEXT_ENCODER, Component.TEXT_ENCODER_2
TARGETS = {
    UNET: ["to_q", "to_out.0", "conv1", "proj_in"],
    TEXT: ["q_proj", "fc1"],
    SECOND: ["v_proj", "text_projection"],
}
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def train(root: Path, component: Component, out: Path, **settings: Any) -> dict[str, Tensor]:
    """Save a random adapter for a network of the model in `root`; gives the weights after PEFT has merged it."""
    network = open_checkpoint(str(root)).load(component)
    config = LoraConfig(r=3, target_modules=TARGETS[component], init_lora_weights=False, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's way to ask transformers
        adapted: PeftModel = get_peft_model(network, config)  # type: ignore[arg-type]
    adapted.save_pretrained(str(out))
    merged: nn.Module = adapted.merge_and_unload()  # type: ignore[operator]
    return merged.state_dict()


def merges(root: Path, component: Component, lora: Path, expected: dict[str, Tensor]) -> None:
    checkpoint = open_checkpoint(str(root), loras=[(lora, 1.0)])
    got, plain = (
        checkpoint.load(component).state_dict(),
        open_checkpoint(str(root)).load(component).state_dict(),
    )
    assert got.keys() == expected.keys()
    assert max((got[name] - expected[name]).abs().max().item() for name in got) < 1e-6
    assert max((got[name] - plain[name]).abs().max().item() for name in got) > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 5},
        {"lora_alpha": 5, "use_rslora": True},
        {"lora_alpha": 5, "alpha_pattern": {"to_q": 1, r"attn\d\.to_out.0": 9}, "rank_pattern": {"conv1": 2}},
    ],
)
def test_a_folder_of_peft(folder: Callable[..., Path], tmp_path: Path, settings: dict[str, Any]) -> None:
    root = folder()
    expected = train(root, UNET, tmp_path / "style", **settings)
    merges(root, UNET, tmp_path / "style", expected)
    merges(root, UNET, tmp_path / "style" / FILE, expected)
    renamed = (tmp_path / "style" / FILE).rename(tmp_path / "style" / "mine.safetensors")
    merges(root, UNET, renamed, expected)


@pytest.mark.parametrize("component", [UNET, TEXT, SECOND])
def test_each_network_of_xl(folder: Callable[..., Path], tmp_path: Path, component: Component) -> None:
    root = folder(Family.SDXL)
    expected = train(root, component, tmp_path / component.value, lora_alpha=2)
    merges(root, component, tmp_path / component.value, expected)


def test_the_second_text_encoder_by_its_class(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder(Family.SDXL)
    expected = train(root, SECOND, tmp_path / "style", lora_alpha=2)
    config = json.loads((tmp_path / "style" / CONFIG).read_text())
    config["auto_mapping"] = {"base_model_class": "CLIPTextModelWithProjection"}
    (tmp_path / "style" / CONFIG).write_text(json.dumps(config))
    merges(root, SECOND, tmp_path / "style", expected)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"unet.{name}",
        lambda name: name.replace("base_model.model.", "base_model.model.unet."),
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: f"unet.{name}".replace(".weight", ".my-style_1.weight"),
        lambda name: name.replace("base_model.model.", "unet.").replace(".weight", ".default.weight"),
    ],
)
def test_every_way_to_name_them(
    folder: Callable[..., Path], tmp_path: Path, rename: Callable[[str], str]
) -> None:
    root = folder()
    expected = train(root, UNET, tmp_path / "style", lora_alpha=3)  # α / r is 1, with settings and without
    tensors = load_file(tmp_path / "style" / FILE)
    save_file({rename(name): tensor for name, tensor in tensors.items()}, tmp_path / "renamed.safetensors")
    merges(root, UNET, tmp_path / "renamed.safetensors", expected)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoder_of_either_transformers(
    folder: Callable[..., Path], tmp_path: Path, prefix: str
) -> None:
    root = folder()
    expected = train(root, TEXT, tmp_path / "style", lora_alpha=3)
    tensors = load_file(tmp_path / "style" / FILE)
    for stem in ("base_model.model.", "text_encoder.base_model.model."):
        renamed = {
            name.replace("base_model.model.", stem + prefix): tensor for name, tensor in tensors.items()
        }
        save_file(renamed, tmp_path / "renamed.safetensors")
        merges(root, TEXT, tmp_path / "renamed.safetensors", expected)


def test_what_is_recorded(
    folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder's name says more than that of the file in it; α is in the settings, so they are hashed, too."""
    root = folder()
    train(root, UNET, tmp_path / "style", lora_alpha=3)
    checkpoint = open_checkpoint(str(root), loras=[(tmp_path / "style", 1.0)])
    assert [lora.name for lora in checkpoint.loras] == ["style"]
    assert checkpoint.files[f"lora-1/{CONFIG}"] == tmp_path / "style" / CONFIG
    assert not caplog.records
    (tmp_path / "style" / CONFIG).unlink()
    open_checkpoint(str(root), loras=[(tmp_path / "style", 1.0)])
    assert "has no adapter_config.json beside it" in caplog.text


def test_settings_that_belong_to_another_file(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder()
    expected = train(root, UNET, tmp_path / "style", lora_alpha=3)
    tensors = load_file(tmp_path / "style" / FILE)
    edited = {**json.loads((tmp_path / "style" / CONFIG).read_text()), "lora_alpha": 99}
    (tmp_path / "style" / CONFIG).write_text(json.dumps(edited))
    own = {name.replace("base_model.model.", "unet."): tensor for name, tensor in tensors.items()}
    save_file(own, tmp_path / "style" / "diffusers.safetensors")
    merges(root, UNET, tmp_path / "style" / "diffusers.safetensors", expected)


def test_two_adapters_in_one_file(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder()
    train(root, UNET, tmp_path / "style", lora_alpha=3)
    tensors = load_file(tmp_path / "style" / FILE)
    both = {
        name.replace(".weight", f".{adapter}.weight"): tensor.clone()
        for name, tensor in tensors.items()
        for adapter in ("a", "b")
    }
    save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(CheckpointError, match="two LoRAs in one"):
        open_checkpoint(str(root), loras=[(tmp_path / "both.safetensors", 1.0)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOKR"}, "has a LOKR in its adapter_config.json"),
        ({"use_dora": True}, "has use_dora in its adapter_config.json"),
        ({"lora_alpha": "much"}, "has bad adapter_config.json"),
        ({"alpha_pattern": {"to_q": None}}, "has bad adapter_config.json"),
    ],
)
def test_settings_that_are_refused(
    folder: Callable[..., Path], tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    root = folder()
    train(root, UNET, tmp_path / "style", lora_alpha=3)
    config = tmp_path / "style" / CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(str(root), loras=[(tmp_path / "style", 1.0)])
    assert "\n" not in str(error.value)


def test_folders_without_a_lora(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder()
    style = tmp_path / "style"
    (style / "unet").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"has neither adapter_model.safetensors nor pytorch_lora"):
        open_checkpoint(str(root), loras=[(style, 1.0)])
    (style / "unet" / FILE).touch()
    with pytest.raises(CheckpointError, match="name one of its folders: unet"):
        open_checkpoint(str(root), loras=[(style, 1.0)])
    (style / "adapter_model.bin").touch()
    with pytest.raises(PickleError):
        open_checkpoint(str(root), loras=[(style, 1.0)])


def test_scale_without_an_alpha() -> None:
    assert Settings.from_json({}, "x", CONFIG).scale("a.to_q", 4) == 2.0  # PEFT's default α is 8


def test_a_bundled_embedding_is_left_out(
    folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = folder()
    expected = train(root, UNET, tmp_path / "style", lora_alpha=3)
    tensors = {**load_file(tmp_path / "style" / FILE), "bundle_emb.word.string_to_param.*": torch.ones(1, 64)}
    save_file(tensors, tmp_path / "style" / FILE)
    merges(root, UNET, tmp_path / "style", expected)
    assert "has embeddings, which are left out: word" in caplog.text
    save_file({"bundle_emb.word.string_to_param.*": torch.ones(1, 64)}, tmp_path / "only.safetensors")
    with pytest.raises(CheckpointError, match="is empty"):
        open_checkpoint(str(root), loras=[(tmp_path / "only.safetensors", 1.0)])


def test_layers_that_the_config_leaves_out(
    folder: Callable[..., Path],
    edit_json: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A LoRA of all layers for a text encoder that was cut to fewer."""
    root = folder()
    expected = train(root, TEXT, tmp_path / "style", lora_alpha=3)
    edit_json(root / "text_encoder" / "config.json", num_hidden_layers=1)
    kept = {name: tensor for name, tensor in expected.items() if "layers.1." not in name}
    with caplog.at_level(logging.WARNING):
        merges(root, TEXT, tmp_path / "style", kept)
    said = [record.getMessage() for record in caplog.records if "encoder_layers_1_" in record.getMessage()]
    assert len(said) == 1 and "text_encoder: left out, since the config says fewer layers" in said[0]
