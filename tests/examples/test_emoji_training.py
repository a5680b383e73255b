"""The demo model's training, for seconds: every stage runs, goes on where it was stopped, and ends in what rt reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rt.export.checkpoint import open_checkpoint
from rt.export.weights import read_header
from rt.model import Component

CODE = Path(__file__).parents[2] / "examples" / "emoji-ldm" / "train"

pytestmark = pytest.mark.slow


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CODE / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def run(renderer: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "run"
    for done in (script("prepare.py", folder, "--preset", "smoke"), script("train.py", folder)):
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_model_is_whole(run: Path) -> None:
    checkpoint = open_checkpoint(str(run / "model"))
    assert not checkpoint.spec.inpainting and checkpoint.spec.latent_channels == 4
    assert (run / "model" / "names.txt").read_text().splitlines()[0] == "a red heart"
    previews = {path.name.split("-")[0] for path in run.glob("*-*.png")}
    assert previews >= {"autoencoder", "diffusion", "decoder"}


def test_what_is_finished_is_not_done_again(run: Path) -> None:
    """The files it left are read and stay as they were."""
    left = {path: path.stat().st_mtime_ns for path in (*run.glob("*.ckpt"), *run.glob("*.pt"))}
    assert {path.name for path in left} >= {"autoencoder.ckpt", "diffusion.ckpt", "decoder.ckpt"}
    before = (run / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    again = script("train.py", run)
    assert again.returncode == 0, again.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in left} == left
    assert (run / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_a_stopped_stage_goes_on(run: Path) -> None:
    """From its checkpoint, and not from the beginning."""
    path = run / "diffusion.ckpt"
    left = torch.load(path)
    torch.save({**left, "spent": left["spent"] / 2}, path)
    again = script("train.py", run)
    assert again.returncode == 0, again.stderr[-3000:]
    after = torch.load(path)
    assert after["step"] > left["step"] and after["spent"] > left["spent"] / 2
    assert after["weights"]["updates"] == after["step"]
    assert not after["weights"]["vector"].equal(left["weights"]["vector"])


def test_another_configuration_leaves_the_run_alone(run: Path) -> None:
    before = (run / "config.json").read_bytes()
    refused = script("prepare.py", run, "--preset", "cpu")
    assert refused.returncode == 1 and "belongs to another configuration" in refused.stderr
    assert (run / "config.json").read_bytes() == before
    assert script("prepare.py", run, "--preset", "smoke").returncode == 0


def test_inpainting(run: Path) -> None:
    done = script("train.py", run, "--variant", "inpainting")
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = open_checkpoint(str(run / "inpainting"))
    assert checkpoint.spec.inpainting
    stored = {tensor.dtype for tensor in checkpoint.source.headers(Component.UNET).values()}
    assert stored == {torch.float8_e4m3fn, torch.float16}
    new = checkpoint.load(Component.UNET).conv_in.weight[:, 4:]
    assert new.abs().max() > 0  # they began as zeros


def merged(run: Path, variant: str) -> set[str]:
    """Train the variant, and name the weights of the model that its LoRA changes."""
    done = script("train.py", run, "--variant", variant)
    assert done.returncode == 0, done.stderr[-3000:]
    lora = run / variant / f"{variant}.safetensors"
    plain = open_checkpoint(str(run / "model")).load(Component.UNET).state_dict()
    other = open_checkpoint(str(run / "model"), loras=[(lora, 1.0)]).load(Component.UNET).state_dict()
    return {name for name in plain if not plain[name].equal(other[name])}


def test_lcm(run: Path) -> None:
    """A pair for each matrix; after seconds of training some of them are nothing in float8."""
    changed = merged(run, "lcm")
    lora = read_header(run / "lcm" / "lcm.safetensors")[0]
    assert {tensor.dtype for tensor in lora.values()} == {torch.float8_e4m3fn}
    shapes = open_checkpoint(str(run / "model")).source.headers(Component.UNET)
    matrices = {name for name, tensor in shapes.items() if tensor.ndim > 1}
    assert len(lora) == 2 * len(matrices)
    assert changed <= matrices and len(changed) > 0.25 * len(matrices)


def test_pixel_art(run: Path) -> None:
    changed = merged(run, "pixel-art")
    assert any(name.endswith("to_q.weight") for name in changed)
    assert any(name.endswith("conv1.weight") for name in changed)


def test_a_run_that_was_not_prepared(tmp_path: Path) -> None:
    done = script("train.py", tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "prepare.py" in done.stderr
