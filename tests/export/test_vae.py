"""An autoencoder from elsewhere in the place of a checkpoint's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rt.bundle import SourceRecord
from rt.errors import CheckpointError, PickleError
from rt.export import hub
from rt.export.architectures import SCALING_FACTORS, vae
from rt.export.checkpoint import Checkpoint, open_checkpoint
from rt.model import Component, Family

WEIGHTS = "diffusion_pytorch_model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Folder = Callable[..., Path]
Edit = Callable[..., None]


@pytest.fixture
def other(folder: Folder, tmp_path: Path, edit_weights: Edit) -> Path:
    """A model whose VAE has weights that are twice as large."""
    root = Path(shutil.copytree(folder(), tmp_path / "other"))
    edit_weights(root / "vae" / WEIGHTS, lambda state: state.update({n: 2 * t for n, t in state.items()}))
    return root


def state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return checkpoint.load(Component.VAE_DECODER).state_dict()


def has_vae(checkpoint: Checkpoint, other: Path) -> None:
    expected, got = load_file(other / "vae" / WEIGHTS), state(checkpoint)
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


def refused(root: Path, name: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(root), vae=str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["vae", "", f"vae/{WEIGHTS}"])
def test_of_a_folder(folder: Folder, other: Path, tmp_path: Path, name: str, edit_json: Edit) -> None:
    """A VAE's folder, that of its model, or the file in it, which has its config beside it."""
    root = tmp_path / "sd1"
    edit_json(other / "vae" / "config.json", force_upcast=False)
    checkpoint = open_checkpoint(str(root), vae=str(other / name))
    has_vae(checkpoint, other)
    assert checkpoint.configs["vae"]["force_upcast"] is False
    own = {file: path for file, path in checkpoint.files.items() if file.startswith("vae/")}
    assert own == {f"vae/{file}": other / "vae" / file for file in ("config.json", WEIGHTS)}
    shutil.rmtree(root / "vae")
    has_vae(open_checkpoint(str(root), vae=str(other / name)), other)


def test_scale(other: Path, tmp_path: Path, edit_json: Edit, caplog: pytest.LogCaptureFixture) -> None:
    """By its config, else as the checkpoint's own."""
    root, file = tmp_path / "sd1", tmp_path / "alone.safetensors"
    edit_json(root / "vae" / "config.json", scaling_factor=0.5)
    shutil.copy(other / "vae" / WEIGHTS, file)
    assert open_checkpoint(str(root), vae=str(file)).spec.scaling_factor == 0.5
    assert not caplog.records
    assert open_checkpoint(str(root), vae=str(other)).spec.scaling_factor == SCALING_FACTORS[Family.SD1]
    assert "scales latents by 0.18215 and such a model's own by 0.5" in caplog.text


def test_half_precision(other: Path, tmp_path: Path) -> None:
    halved = {name: tensor.half() for name, tensor in load_file(other / "vae" / WEIGHTS).items()}
    save_file(halved, other / "vae" / WEIGHTS)
    checkpoint = open_checkpoint(str(tmp_path / "sd1"), vae=str(other))
    assert all(torch.equal(tensor, halved[name].float()) for name, tensor in state(checkpoint).items())


def test_of_a_synthetic_model(tmp_path: Path) -> None:
    own = open_checkpoint("synthetic:tiny").configs["vae"]
    root = tmp_path / "vae"
    root.mkdir()
    zeros = {
        name: torch.zeros_like(tensor) for name, tensor in state(open_checkpoint("synthetic:tiny")).items()
    }
    save_file(zeros, root / WEIGHTS)
    (root / "config.json").write_text(json.dumps(own))
    checkpoint = open_checkpoint("synthetic:tiny", vae=str(root))
    assert not any(tensor.any() for tensor in state(checkpoint).values())


def test_the_hash_of_a_single_file_is_its_own() -> None:
    files = {"vae/a.safetensors": "1" * 64, "z.safetensors": "2" * 64}
    record = SourceRecord(name="z.safetensors", kind="single_file", revision=None, licence=None, files=files)
    assert record.model_hash == "2" * 10
    assert replace(record, files={"unet/x.safetensors": "3" * 64, **files}).model_hash == "3" * 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantize.embedding.weight": (2, 4)}, "is a VQ autoencoder"),
        ({"decoder.conv_in.weight": (64, 16, 3, 3)}, "has 16 latent channels, and the U-Net 4"),
        ({"decoder.conv_in.bias": (63,)}, "of another shape"),
        ({"decoder.extra": (1,)}, "decoder.extra is not part of a AutoencoderKL"),
        ({"decoder.conv_in.weight": None}, "lacks 'decoder.conv_in.weight': the file is incomplete"),
        ({"post_quant_conv.weight": None}, "post_quant_conv.weight is missing"),
    ],
)
def test_files_that_do_not_fit(
    other: Path, tmp_path: Path, change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    tensors = load_file(other / "vae" / WEIGHTS)
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.zeros(shape)
    save_file(tensors, tmp_path / "bad.safetensors")
    assert message in (said := refused(tmp_path / "sd1", tmp_path / "bad.safetensors"))
    assert "bad.safetensors" in said


def test_other_things(other: Path, tmp_path: Path, edit_json: Edit) -> None:
    root = tmp_path / "sd1"
    save_file({"1.weight": torch.ones(1)}, tmp_path / "taesd.safetensors")
    assert "has no VAE that rt knows" in refused(root, tmp_path / "taesd.safetensors")
    assert "is of the class UNet2DConditionModel" in refused(root, root / "unet")
    (tmp_path / "empty").mkdir()
    assert "has no VAE: neither vae/config.json nor config.json" in refused(root, tmp_path / "empty")
    assert "does not exist" in refused(root, tmp_path / "none.safetensors")
    assert "has no weights to take" in refused(root, "synthetic:sd15")
    edit_json(other / "vae" / "config.json", _class_name="VQModel")
    assert "is of the class VQModel" in refused(root, other)
    with pytest.raises(PickleError):
        open_checkpoint(str(root), vae="vae.ckpt")


def test_of_another_size(other: Path, tmp_path: Path, edit_json: Edit) -> None:
    deeper = vae((32, 64, 64), 16, layers=1)
    edit_json(other / "vae" / "config.json", **deeper)
    assert "makes 4 x 4 pixels of a latent, and the checkpoint's own 2 x 2" in refused(
        tmp_path / "sd1", other
    )


@pytest.fixture(params=["null", "absent", "AutoencoderTiny", "AsymmetricAutoencoderKL", "no folder"])
def without(request: pytest.FixtureRequest, folder: Folder, other: Path, edit_json: Edit) -> Path:
    """A model whose own VAE, which is small and of other keys, rt does not run, or that has none."""
    kind, root = request.param, other.with_name("without")
    shutil.copytree(other, root)
    edit_json(root / "vae" / "config.json", scaling_factor=1.0)
    if kind in ("null", "absent"):
        shutil.rmtree(root / "vae")
        index = json.loads((root / "model_index.json").read_text())
        del index["vae"]
        more = {"vae": [None, None]} if kind == "null" else {}
        (root / "model_index.json").write_text(json.dumps(index | more))
    elif kind == "no folder":
        shutil.rmtree(root / "vae")
    else:
        edit_json(root / "model_index.json", vae=["diffusers", kind])
        config = {
            "_class_name": kind,
            "latent_channels": 4,
            "encoder_block_out_channels": [64],
            "scaling_factor": 1.0,
        }
        (root / "vae" / "config.json").write_text(json.dumps(config))
        (root / "vae" / WEIGHTS).unlink()
    return root


@pytest.mark.parametrize("alone", [False, True])
def test_of_a_model_without_a_usable_one(
    without: Path, other: Path, tmp_path: Path, alone: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also by a file that does not say how it scales; the model's own says nothing of AutoencoderKL."""
    name = other / "vae"
    if alone:
        name = tmp_path / "alone.safetensors"
        shutil.copy(other / "vae" / WEIGHTS, name)
    checkpoint = open_checkpoint(str(without), vae=str(name))
    has_vae(checkpoint, other)
    assert checkpoint.spec.scaling_factor == SCALING_FACTORS[Family.SD1] and not caplog.records
    with pytest.raises(CheckpointError, match=r"; or name one with --vae$"):
        open_checkpoint(str(without))


def test_of_a_hub_model_without_a_usable_one(
    without: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [path.relative_to(without).as_posix() for path in without.rglob("*") if path.is_file()]
    info = SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(model_info=lambda repo, revision: info))
    monkeypatch.setattr(hub, "snapshot_download", lambda *names, **options: str(without))
    has_vae(open_checkpoint("org/name", vae=str(other)), other)
    with pytest.raises(CheckpointError, match=r"; or name one with --vae$"):
        open_checkpoint("org/name")


@pytest.mark.parametrize("size", [None, 16, [24, 16]])
@pytest.mark.parametrize("alone", [False, True])
def test_the_sample_size_is_the_models(
    other: Path, tmp_path: Path, edit_json: Edit, size: object, alone: bool
) -> None:
    """The U-Net's or where it has none that of the model's own VAE, as without `--vae`."""
    root, name = tmp_path / "sd1", other / "vae"
    edit_json(root / "unet" / "config.json", sample_size=size)
    edit_json(other / "vae" / "config.json", sample_size=1024)
    if alone:
        name = tmp_path / "alone.safetensors"
        shutil.copy(other / "vae" / WEIGHTS, name)
    expected = open_checkpoint(str(root)).spec.sample_size
    assert open_checkpoint(str(root), vae=str(name)).spec.sample_size == expected


@pytest.mark.parametrize("whose", ["sd1", "other"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_out_channels": [32] * 50}, "block_out_channels has 50 entries, expected 1 to 10"),
        ({"block_out_channels": [32] * 100}, "block_out_channels has 100 entries, expected 1 to 10"),
        ({"block_out_channels": []}, "block_out_channels has 0 entries, expected 1 to 10"),
        ({"block_out_channels": 3}, "block_out_channels is 3, expected a list"),
        ({"latent_channels": "4"}, "latent_channels is '4', expected a whole number"),
        ({"latent_channels": ...}, "vae has no latent_channels"),
        ({"scaling_factor": "0.18"}, "scaling_factor is '0.18', expected a finite number or null"),
        ({"sample_size": [8, 8, 8]}, "sample_size has 3 entries, expected a height and a width"),
    ],
)
def test_configs_without_meaning(
    other: Path, tmp_path: Path, whose: str, values: dict[str, object], message: str
) -> None:
    path = tmp_path / whose / "vae" / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    said = refused(tmp_path / "sd1", other)
    assert said.startswith(str(tmp_path / whose)) and message in said


@pytest.mark.parametrize("place", ["vae/", ""])
def test_of_the_hub(other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """A repository of a VAE alone or of a model; nothing but the VAE is fetched."""
    remote = other if place else other / "vae"
    snapshot = tmp_path / "cache" / "models--org--name" / "snapshots" / COMMIT
    names = [path.relative_to(remote).as_posix() for path in remote.rglob("*") if path.is_file()]
    fetched = []

    def fetch(repo: str, *, revision: str, allow_patterns: list[str], local_files_only: bool) -> str:
        assert (repo, revision, local_files_only) == ("org/name", COMMIT, False)
        for name in names:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(remote / name, snapshot / name)
                fetched.append(name)
        return str(snapshot)

    siblings = [SimpleNamespace(rfilename=name) for name in names]
    info = SimpleNamespace(sha=COMMIT, siblings=siblings)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(model_info=lambda repo, revision: info))
    monkeypatch.setattr(hub, "snapshot_download", fetch)
    has_vae(open_checkpoint(str(tmp_path / "sd1"), vae="org/name"), other)
    assert sorted(fetched) == [f"{place}config.json", f"{place}{WEIGHTS}"]

    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    has_vae(open_checkpoint(str(tmp_path / "sd1"), vae="org/name", offline=True), other)
