"""Tiny checkpoints with fresh random weights, in diffusers' layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rt.export.architectures import Architecture, clip, unet, vae
from rt.export.facts import FOLDERS
from rt.export.synthetic import byte_vocabulary
from rt.export.weights import build
from rt.model import Family

_VOCAB = 514  # single bytes, start and end
_LINEAR = {"use_linear_projection": True, "layers_per_block": 1}

# As published in the tokenizers' special_tokens_map.json.
_PAD_TOKENS = {
    Family.SD1: ["<|endoftext|>"],
    Family.SD2: ["!"],
    Family.SDXL: ["<|endoftext|>", "!"],
}

TINY = {
    Family.SD1: Architecture(
        Family.SD1,
        unet((32, 64), 64, 8, 8, depths=(1, 0), layers_per_block=2),
        vae((32, 64), 16, layers=1),
        (clip(64, 2, 1, act="quick_gelu", vocab=_VOCAB, tokens=12),),
    ),
    Family.SD2: Architecture(
        Family.SD2,
        unet((64, 128), 64, 8, [1, 2], depths=(1, 0), **_LINEAR),
        vae((32, 64), 16, layers=1),
        (clip(64, 2, 1, act="gelu", vocab=_VOCAB, tokens=12),),
    ),
    Family.SDXL: Architecture(
        Family.SDXL,
        unet(
            (64, 128),
            192,
            8,
            [1, 2],
            depths=(0, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=96 + 6 * 256,
            **_LINEAR,
        ),
        vae((32, 64), 16, scaling_factor=0.13025, layers=1),
        (
            clip(64, 2, 1, act="quick_gelu", vocab=_VOCAB, tokens=12),
            clip(128, 3, 2, act="gelu", vocab=_VOCAB, tokens=12, projection=96),
        ),
    ),
}


def write_tokenizer(folder: Path, pad_token: str) -> None:
    folder.mkdir(parents=True)
    vocab = {**byte_vocabulary(), "<|startoftext|>": _VOCAB - 2, "<|endoftext|>": _VOCAB - 1}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad_token}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def _write_folder(root: Path, architecture: Architecture) -> None:
    """Every parameter drawn anew, so that two swapped ones differ."""
    for name, config in architecture.configs.items():
        if name == "model_index":
            path = root / "model_index.json"
        else:
            path = root / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config))
    for component, folder in FOLDERS.items():
        if folder not in architecture.configs:
            continue
        state = build(component, architecture.configs[folder]).state_dict()
        state = {key: torch.randn(value.shape) * 0.1 for key, value in state.items()}
        stem = "model" if folder.startswith("text_encoder") else "diffusion_pytorch_model"
        save_file(state, root / folder / f"{stem}.safetensors", metadata={"format": "pt"})
    for i, pad_token in enumerate(_PAD_TOKENS[architecture.family]):
        write_tokenizer(root / ("tokenizer", "tokenizer_2")[i], pad_token)


@pytest.fixture(scope="session")
def write_folder() -> Callable[[Path, Architecture], None]:
    """`write_folder(root, architecture)` writes a model with fresh random weights."""
    return _write_folder


@pytest.fixture(scope="session")
def tiny_architectures() -> dict[Family, Architecture]:
    """Of the folders that `folder` copies."""
    return TINY


@pytest.fixture(scope="session")
def _masters(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    roots = {}
    for family, architecture in TINY.items():
        roots[family] = tmp_path_factory.mktemp(family.value)
        _write_folder(roots[family], architecture)
    return roots


@pytest.fixture
def folder(_masters: dict[Family, Path], tmp_path: Path) -> Callable[[Family], Path]:
    """A diffusers folder of the family, for the test to damage."""

    def copy(family: Family = Family.SD1) -> Path:
        return Path(shutil.copytree(_masters[family], tmp_path / family.value))

    return copy


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """`edit_json(path, key=value)` sets keys of a JSON file."""

    def edit(path: Path, **values: object) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


@pytest.fixture
def edit_weights() -> Callable[..., None]:
    """`edit_weights(path, change)` lets `change` alter the dict of tensors in a safetensors file."""

    def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        state = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(state)
        save_file(state, path, metadata={"format": "pt"})

    return edit


@pytest.fixture
def demo() -> Path:
    """The trained demo model of the repository: float16, VAE factor 4, 16 tokens, the old names of CLIP."""
    return Path(__file__).parents[2] / "examples" / "emoji-ldm"
