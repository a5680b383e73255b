from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from rt.errors import CheckpointError
from rt.export.architectures import ARCHITECTURES
from rt.export.checkpoint import Kind, open_checkpoint
from rt.export.synthetic import byte_vocabulary
from rt.export.weights import build_empty
from rt.model import Component, Family

# Parameters of the published models: stable-diffusion-v1-5, -2-1 and -xl-base-1.0.
PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_real_sizes(name: str) -> None:
    checkpoint = open_checkpoint(f"synthetic:{name}")
    folders = {component: component.value.replace("_decoder", "") for component in checkpoint.components}
    sizes = {
        folder: count(build_empty(component, checkpoint.configs[folder]))
        for component, folder in folders.items()
    }
    assert sizes == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "family", "pixels", "scheduler", "prediction"),
    [
        ("sd15", Family.SD1, 512, "PNDMScheduler", "epsilon"),
        ("sd21", Family.SD2, 768, "DDIMScheduler", "v_prediction"),
        ("sdxl", Family.SDXL, 1024, "EulerDiscreteScheduler", "epsilon"),
        ("tiny", Family.SD1, 128, "PNDMScheduler", "epsilon"),
    ],
)
def test_spec(name: str, family: Family, pixels: int, scheduler: str, prediction: str) -> None:
    checkpoint = open_checkpoint(f"synthetic:{name}")
    spec = checkpoint.spec
    assert checkpoint.kind is Kind.SYNTHETIC
    assert not checkpoint.files
    assert spec.family is family
    assert spec.sample_size * spec.vae_scale_factor == pixels
    assert spec.max_tokens == 77
    assert (spec.scheduler["_class_name"], spec.scheduler["prediction_type"]) == (scheduler, prediction)


def test_unknown_name() -> None:
    with pytest.raises(CheckpointError, match=r"did you mean 'sd15'\?\); there are: sd15, sd21, sdxl, tiny"):
        open_checkpoint("synthetic:sd1.5")


def test_tokenizer_is_bytes() -> None:
    tokenizer = open_checkpoint("synthetic:tiny").tokenizer(Component.TEXT_ENCODER)
    vocabulary = byte_vocabulary()
    assert sorted(vocabulary.values()) == list(range(512))
    ids = tokenizer("Né !").ids
    expected = [512, *(vocabulary[c] for c in ("n", "Ã", "©</w>", "!</w>")), 513]
    assert ids[: len(expected)].tolist() == expected
    assert ids.shape == (77,) and (ids[len(expected) :] == 513).all()


def test_tokenizers_of_the_second_encoder_pad_with_zero() -> None:
    checkpoint = open_checkpoint("synthetic:sdxl")
    first, second = (checkpoint.tokenizer(encoder)("a").ids for encoder in checkpoint.spec.text_encoders)
    assert first[:3].tolist() == second[:3].tolist() == [49406, byte_vocabulary()["a</w>"], 49407]
    assert (first[3:] == 49407).all() and (second[3:] == 0).all()


_HASH = """
import hashlib, torch
from rt.export.checkpoint import open_checkpoint
checkpoint = open_checkpoint("synthetic:tiny")
torch.set_num_threads(2)
for component in reversed(checkpoint.components):
    digest = hashlib.sha256()
    for tensor in checkpoint.load(component).state_dict().values():
        digest.update(tensor.numpy().tobytes())
    print(component.value, digest.hexdigest())
"""


def test_the_same_bits_in_every_process() -> None:
    """Whatever was drawn before, in which order the components load, on how many threads."""
    command = [sys.executable, "-c", _HASH]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    checkpoint = open_checkpoint("synthetic:tiny")
    for component in checkpoint.components:
        torch.rand(7)
        digest = hashlib.sha256()
        for tensor in checkpoint.load(component).state_dict().values():
            digest.update(tensor.numpy().tobytes())
        assert f"{component.value} {digest.hexdigest()}\n" in output


def test_loading_leaves_the_random_state_alone() -> None:
    checkpoint = open_checkpoint("synthetic:tiny")
    before = torch.random.get_rng_state()
    checkpoint.load(Component.VAE_DECODER)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_activations_of_tiny_fit_float16() -> None:
    checkpoint = open_checkpoint("synthetic:tiny")
    peak = 0.0

    def watch(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal peak
        if isinstance(output, torch.Tensor):
            peak = max(peak, output.abs().max().item())

    text, unet, vae = (checkpoint.load(component) for component in checkpoint.components)
    for module in (*text.modules(), *unet.modules(), *vae.modules()):
        module.register_forward_hook(watch)
    ids = torch.from_numpy(checkpoint.tokenizer(Component.TEXT_ENCODER)("a red heart").ids)[None]
    with torch.inference_mode():
        states = text(ids).last_hidden_state
        latents = torch.randn(1, 4, 16, 16)
        noise = unet(latents, torch.tensor(500), states).sample
        image = vae.decode(latents / checkpoint.spec.scaling_factor).sample
    assert noise.shape == latents.shape and image.shape == (1, 3, 128, 128)
    assert noise.std() > 1e-3 and image.std() > 1e-3  # constant outputs would hide any error
    assert np.isfinite(peak) and 0 < peak < torch.finfo(torch.float16).max / 16


def test_tiny_is_a_few_megabytes() -> None:
    checkpoint = open_checkpoint("synthetic:tiny")
    assert sum(count(checkpoint.load(component)) for component in checkpoint.components) * 4 < 24e6
    assert set(ARCHITECTURES) == {*PARAMETERS, "tiny"}
