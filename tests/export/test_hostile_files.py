"""Whatever a checkpoint's files hold or lead to: one clear line, soon, or what the libraries make of it."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rt.errors import CheckpointError, ConfigError
from rt.export.architectures import Architecture
from rt.export.checkpoint import open_checkpoint
from rt.export.facts import FOLDERS, components, read_spec
from rt.export.lora import open_lora
from rt.export.weights import LARGEST, build_empty, check, read_header
from rt.model import Component, Family
from rt.samplers import Scheduler

Folder = Callable[..., Path]
Edit = Callable[..., None]

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
DEEP = b"[" * 200_000


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


# Files of any kind.

JSON = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{folder}/config.json" for folder in ("text_encoder", "unet", "vae")),
    *(
        f"tokenizer/{name}.json"
        for name in ("vocab", "tokenizer_config", "special_tokens_map", "added_tokens")
    ),
    "tokenizer/tokenizer.json",
    "unet/diffusion_pytorch_model.safetensors.index.json",
]


def make_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_hole(path: Path) -> None:
    path.touch()
    os.truncate(path, 5 << 30)


@pytest.mark.parametrize("name", [*JSON, "tokenizer/merges.txt"])
@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (os.mkfifo, "cannot be read: a pipe, not a file"),
        (Path.mkdir, "cannot be read: Is a directory"),
        (make_endless, "cannot be read: a device, not a file"),
        (make_hole, "cannot be read: larger than 16,777,216 bytes"),
    ],
)
def test_a_path_to_no_file(folder: Folder, name: str, make: Callable[[Path], None], problem: str) -> None:
    root = folder()
    (root / UNET).rename(root / "unet" / "shard.safetensors") if "index" in name else None
    (root / name).unlink(missing_ok=True)
    make(root / name)
    assert f"{root / name} {problem}" in refused(lambda: open_checkpoint(str(root)))


@pytest.mark.parametrize("name", JSON)
def test_json_of_any_shape(folder: Folder, name: str) -> None:
    root = folder()
    (root / UNET).rename(root / "unet" / "shard.safetensors") if "index" in name else None
    for raw, problem in (
        (DEEP, "is not JSON: nested more than 64 deep"),
        ('{"é": 1}'.encode("utf-16"), "not UTF-8 text"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5,000 digits"),
        (b"[1, 2]", "holds a"),
        (b"NaN", "NaN is no JSON"),
    ):
        (root / name).write_bytes(raw)
        message = refused(lambda: open_checkpoint(str(root))).replace("(", ": ").replace(" : ", ": ")
        assert f"{root / name} " in message and problem in message


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, make_endless])
def test_weights_that_are_no_file(folder: Folder, make: Callable[[Path], None]) -> None:
    root = folder()
    (root / UNET).unlink()
    make(root / UNET)
    assert f"{root / UNET} is no plain file" in refused(lambda: open_checkpoint(str(root)))


def test_what_is_not_read_is_not_hashed(folder: Folder) -> None:
    root = folder()
    os.mkfifo(root / "tokenizer" / "notes.txt")
    make_endless(root / "tokenizer" / "more.json")
    (root / "README.md").symlink_to("/dev/zero")
    assert all(path.is_file() for path in open_checkpoint(str(root)).files.values())


def test_a_readme_of_gigabytes(folder: Folder) -> None:
    root = folder()
    (root / "README.md").write_text("---\nlicense: mit\n---\n")
    os.truncate(root / "README.md", 5 << 30)
    assert open_checkpoint(str(root)).licence == "mit"


@pytest.mark.parametrize(
    "header", [b'{"a":' * 200_000, b'{"__metadata__":' + DEEP, b"\xff{}", b"[]", b"{}" * 9]
)
def test_headers_of_any_shape(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "bad safetensors header" in refused(lambda: read_header(path))


@pytest.mark.parametrize("settings", [DEEP.decode(), '{"unet.lora_alpha": 1%s}' % ("0" * 400), "[1]", "3"])
def test_settings_of_a_lora_of_any_shape(tmp_path: Path, settings: str) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(
        {"unet.conv_in.lora_A.weight": torch.zeros(1, 1)}, path, metadata={"lora_adapter_metadata": settings}
    )
    assert "bad lora_adapter_metadata" in refused(lambda: open_lora(path, 1.0, tuple(Component)))


# Values of any type and size.

JUNK: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, LARGEST, 10**6, LARGEST + 1, 10**9, 10**12, 2**64, 10**400),
    *(
        0.5,
        -0.5,
        1e308,
        -1e308,
        float("inf"),
        1e-320,
        "",
        "x",
        "8",
        "silu",
        "DownBlock2D",
        "y" * 10**5,
        {},
        {"a": 1},
    ),
    *(
        [],
        [[]],
        [0],
        [1],
        [-1],
        [8, 8],
        [2, 2],
        ["x"],
        [None],
        [1.5, 2],
        [10**6] * 2,
        [LARGEST] * 2,
        [10**12, 1],
    ),
    *([[[1]]], [8] * 10**5, ["CrossAttnDownBlock2D"] * 10**5),
]
# Beside the keys that are there; what else the libraries read and what the first versions wrote.
MORE = {
    "model_index": ["force_zeros_for_empty_prompt"],
    "scheduler": ["_use_default_values", "trained_betas", "clip_sample", "sigma_min"],
    "unet": [
        "_diffusers_version",
        "time_embedding_dim",
        "time_embedding_type",
        "conv_in_kernel",
        "norm_num_groups",
    ],
    "vae": ["norm_num_groups", "latents_mean", "mid_block_add_attention"],
    "text_encoder": ["_attn_implementation", "dtype", "layer_norm_eps"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [Family.SD1, Family.SDXL])
def test_values_of_any_type_and_size(tiny_architectures: dict[Family, Architecture], family: Family) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    base = tiny_architectures[family].configs
    parts = [part for part in components(base, "x") if part is not Component.VAE_ENCODER]
    headers = {part: build_empty(part, base[FOLDERS[part]]).state_dict() for part in parts}
    logging.disable()
    for _ in range(150):
        folder = rng.choice([*base])
        changes = {
            rng.choice([*base[folder], *MORE.get(folder, [])]): rng.choice(JUNK)
            for _ in range(rng.choice((1, 1, 2)))
        }
        configs = {**base, folder: {**base[folder], **changes}}
        try:
            spec = read_spec(configs, "x")
            for part in parts:
                if FOLDERS[part] == folder:
                    check(build_empty(part, configs[folder], headers[part]), headers[part], "x")
            json.dumps(spec.to_json())
            Scheduler.from_config(spec.scheduler).schedule(20)
        except (CheckpointError, ConfigError) as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, changes
        except BaseException:
            print(folder, str(changes)[:1000])
            raise
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("text_encoder", {"num_hidden_layers": 10**6}, "describes a network of more than 1,072 tensors"),
        ("unet", {"layers_per_block": 10**6}, "describes a network of more than"),
        ("unet", {"layers_per_block": 10**9}, "layers_per_block is 1000000000, expected 0 to 1,048,576"),
        ("unet", {"transformer_layers_per_block": 10**6}, "describes a network of more than"),
        ("unet", {"cross_attention_dim": 10**9}, "is 1000000000, expected 1 to 1,048,576"),
        ("unet", {"time_embedding_dim": 10**12}, "is 1000000000000, expected 0 to"),
        ("unet", {"attention_head_dim": -1}, "attention_head_dim is -1, expected 0 to"),
        ("text_encoder", {"vocab_size": 10**12}, "is 1000000000000, expected 0 to"),
        ("text_encoder", {"num_attention_heads": 0}, "describes no network"),
        ("text_encoder", {"eos_token_id": [1]}, "eos_token_id is [1], expected a whole number"),
        ("vae", {"block_out_channels": [32] * 10**6}, "block_out_channels has 1,000,000 entries"),
        ("unet", {"down_block_types": ["DownBlock2D"] * 10**5}, "down_block_types has 100,000 entries"),
        ("vae", {"norm_num_groups": 0}, "describes no network"),
        ("vae", {"scaling_factor": "0.18"}, "scaling_factor is '0.18', expected a finite number or null"),
        ("vae", {"scaling_factor": [1.0]}, "expected a finite number or null"),
        ("vae", {"scaling_factor": True}, "expected a finite number or null"),
        ("vae", {"scaling_factor": 10**400}, "expected a finite number or null"),
        ("vae", {"scaling_factor": 0}, "scaling_factor is 0.0, expected more than 0"),
        ("vae", {"scaling_factor": -0.18}, "scaling_factor is -0.18, expected more than 0"),
        ("model_index", {"force_zeros_for_empty_prompt": "False"}, "expected true or false or null"),
    ],
)
def test_values_without_meaning(
    folder: Folder, edit_json: Edit, name: str, values: dict[str, Any], message: str
) -> None:
    root = folder()
    edit_json(root / ("model_index.json" if name == "model_index" else f"{name}/config.json"), **values)
    assert message in refused(lambda: open_checkpoint(str(root)))


@pytest.mark.parametrize("value", [None, ...])
def test_the_usual_scaling_factor(folder: Folder, edit_json: Edit, value: Any) -> None:
    root = folder()
    config = json.loads((root / "vae" / "config.json").read_text())
    config.pop("scaling_factor")
    (root / "vae" / "config.json").write_text(
        json.dumps(config if value is ... else config | {"scaling_factor": value})
    )
    assert open_checkpoint(str(root)).spec.scaling_factor == 0.18215


def test_only_what_shapes_a_network_reaches_its_library(folder: Folder, edit_json: Edit) -> None:
    root = folder()
    other = {
        "_attn_implementation": "org/kernel",
        "quantization_config": {"load_in_8bit": True},
        "dtype": "int8",
    }
    for name in ("text_encoder", "unet", "vae"):
        edit_json(root / name / "config.json", **other)
    module = open_checkpoint(str(root)).load(Component.TEXT_ENCODER)
    assert module.config._attn_implementation == "sdpa"
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "values", [{"num_train_timesteps": 10**9}, {"trained_betas": 5}, {"beta_end": 10**400}]
)
def test_a_noise_schedule_without_meaning(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"Correct scheduler_config\.json"):
        Scheduler.from_config({"_class_name": "DDIMScheduler", "clip_sample": False, **values})
