"""Text encoders saved with more of CLIP than Stable Diffusion uses, or with more layers than their config says."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rt.errors import CheckpointError
from rt.export.checkpoint import open_checkpoint
from rt.export.names import canonical, count, part, without_prefix
from rt.model import Component, Family

FOLDERS = {Component.TEXT_ENCODER: "text_encoder", Component.TEXT_ENCODER_2: "text_encoder_2"}
Edit = Callable[..., None]


def whole_clip(component: Component) -> dict[str, Tensor]:
    extra = {
        "logit_scale": torch.ones(()),
        "text_model.embeddings.position_ids": torch.arange(12)[None],
        "vision_model.embeddings.class_embedding": torch.ones(64),
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
        "vision_model.encoder.layers.0.mlp.fc1.weight": torch.ones(4, 4),
        "visual_projection.weight": torch.ones(4, 4),
    }
    if component is Component.TEXT_ENCODER:  # the other one has it
        extra["text_projection.weight"] = torch.eye(64)
    return extra


def states(root: Path, component: Component) -> dict[str, Tensor]:
    return open_checkpoint(str(root)).load(component).state_dict()


@pytest.mark.parametrize("component", FOLDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_whole_clip(
    folder: Callable[..., Path],
    edit_weights: Edit,
    component: Component,
    dtype: torch.dtype,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = folder(Family.SDXL)
    file = root / FOLDERS[component] / "model.safetensors"
    halved = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    edit_weights(file, lambda state: state.update(halved))
    expected = states(root, component)
    edit_weights(file, lambda state: state.update(whole_clip(component)))
    with caplog.at_level(logging.INFO):
        got = states(root, component)
    assert "left out, since no CLIPTextModel" in caplog.text
    assert list(got) == list(expected) and all(torch.equal(got[name], expected[name]) for name in got)


def test_in_shards(folder: Callable[..., Path]) -> None:
    root = folder()
    expected = states(root, Component.TEXT_ENCODER)
    file = root / "text_encoder" / "model.safetensors"
    shards = {
        "model-00001-of-00002.safetensors": load_file(file),
        "model-00002-of-00002.safetensors": whole_clip(Component.TEXT_ENCODER),
    }
    file.unlink()
    for name, state in shards.items():
        save_file(state, file.with_name(name), metadata={"format": "pt"})
    weight_map = {tensor: name for name, state in shards.items() for tensor in state}
    file.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    got = states(root, Component.TEXT_ENCODER)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_config_of_a_whole_clip(folder: Callable[..., Path]) -> None:
    """transformers takes the part of it that is for text."""
    root = folder()
    path = root / "text_encoder" / "config.json"
    text = json.loads(path.read_text())
    path.write_text(json.dumps({"model_type": "clip", "projection_dim": 7, "text_config": text}))
    assert open_checkpoint(str(root)).configs["text_encoder"] == text


@pytest.mark.parametrize(
    ("component", "name"),
    [
        (Component.TEXT_ENCODER, "vision.embeddings"),
        (Component.TEXT_ENCODER, "encoder.layers.0.extra"),
        (Component.TEXT_ENCODER_2, "text_projection.bias"),
    ],
)
def test_anything_else_is_an_error(
    folder: Callable[..., Path], edit_weights: Edit, component: Component, name: str
) -> None:
    root = folder(Family.SDXL)
    file = root / FOLDERS[component] / "model.safetensors"
    edit_weights(file, lambda state: state.update({name: torch.ones(1)}))
    with pytest.raises(CheckpointError, match="is not part of a CLIPTextModel"):
        open_checkpoint(str(root))


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("component", FOLDERS)
def test_a_config_of_fewer_layers(
    folder: Callable[..., Path],
    edit_json: Edit,
    edit_weights: Edit,
    component: Component,
    prefix: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = folder(Family.SDXL)
    expected = states(root, component)

    def rename(state: dict[str, Tensor]) -> None:
        for name in [*state]:
            state[name if "projection" in name else prefix + canonical(name)] = state.pop(name)

    edit_weights(root / FOLDERS[component] / "model.safetensors", rename)
    edit_json(root / FOLDERS[component] / "config.json", num_hidden_layers=1)
    got = states(root, component)
    assert "left out, since the config says fewer layers" in caplog.text
    surplus = {
        name for name in expected if canonical(name).startswith(("encoder.layers.1.", "encoder.layers.2."))
    }
    assert surplus and got.keys() == expected.keys() - surplus
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_an_inpainting_model_is_looked_at_once_a_folder(
    folder: Callable[..., Path], edit_json: Edit, edit_weights: Edit, caplog: pytest.LogCaptureFixture
) -> None:
    """It has both halves of the VAE, which are one network."""
    root = folder()
    edit_json(root / "unet" / "config.json", in_channels=9)
    weights = "diffusion_pytorch_model.safetensors"
    edit_weights(
        root / "unet" / weights, lambda state: state.update({"conv_in.weight": torch.zeros(32, 9, 3, 3)})
    )
    edit_weights(root / "vae" / weights, lambda state: state.update({"loss.logvar": torch.zeros(1)}))
    with caplog.at_level(logging.INFO):
        assert open_checkpoint(str(root)).spec.inpainting
    assert caplog.text.count("left out, since no AutoencoderKL has it: loss.logvar") == 1


def test_parts_and_what_follows_a_prefix() -> None:
    tensors = {f"{name}.w": torch.zeros(1) for name in ("a.b.0", "a.b.10", "a.b.1", "ab.2", "c.a.b.3")}
    assert [*part(tensors, "a.b.")] == ["a.b.0.w", "a.b.10.w", "a.b.1.w"]
    assert [*without_prefix(tensors, "a.b.")] == ["0.w", "10.w", "1.w"]
    assert count(tensors, "a.b.") == 3 and count(tensors, "d.") == 0


def test_a_config_of_more_layers(folder: Callable[..., Path], edit_json: Edit) -> None:
    root = folder()
    edit_json(root / "text_encoder" / "config.json", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.2\..* missing"):
        open_checkpoint(str(root))
