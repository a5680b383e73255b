"""From a checkpoint to a bundle: what is written, what is refused, and that nothing is left behind."""

from __future__ import annotations

import errno
import gc
import getpass
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from rt.backends import ON_HOST, Form, get
from rt.bundle import MANIFEST, Bundle
from rt.config import BuildConfig, DType
from rt.errors import AccuracyError, BuildError, ConfigError, NumericsError, ShapeError
from rt.export import build as build_module
from rt.export.build import build, default_profiles
from rt.export.checkpoint import Checkpoint, Kind, open_checkpoint
from rt.export.synthetic import byte_vocabulary
from rt.model import Component, Family, ModelSpec
from rt.shapes import ShapeProfile
from rt.tokenizer import Tokenizer
from rt.verify import TOLERANCE, verify

SMALL = ShapeProfile(16, 16)
SPEC = ModelSpec(
    family=Family.SD1,
    latent_channels=4,
    vae_scale_factor=4,
    sample_size=4,
    scaling_factor=0.2,
    text_encoders=(Component.TEXT_ENCODER,),
    max_tokens=8,
    context_size=32,
    pooled_size=None,
    zero_negative=False,
    scheduler={"_class_name": "DDIMScheduler"},
)


class Text(nn.Module):
    config = SimpleNamespace(vocab_size=514, eos_token_id=513)

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(514, 32), nn.Linear(32, 32)
        self.final_layer_norm = nn.Identity()

    def forward(self, tokens: Tensor, output_hidden_states: bool = False) -> BaseModelOutput:
        embedded = self.embedding(tokens)
        last = self.linear(embedded)
        return BaseModelOutput(last_hidden_state=last, hidden_states=(embedded, last))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1)
        self.time, self.first, self.second = nn.Linear(1, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor, **options: Any) -> tuple[Tensor]:
        hidden = self.conv_in(latents) + self.time(timestep[:, None] / 1000)[:, :, None, None]
        hidden = hidden + self.second(nn.functional.silu(self.first(context))).mean(1)[:, :, None, None]
        return (self.conv_out(nn.functional.silu(hidden)),)


class VAE(nn.Module):
    config = SimpleNamespace(scaling_factor=0.2, shift_factor=None)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(4, 3, 4, stride=4)

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.conv(latents),)


@dataclass(frozen=True)
class Toy(Checkpoint):
    """Three networks of a few layers, so that a whole build takes seconds; `change` alters one after loading."""

    change: Callable[[nn.Module], object] = lambda module: None

    def load(self, component: Component) -> nn.Module:
        torch.manual_seed(0)
        networks: dict[str, Callable[[], nn.Module]] = {
            "text_encoder": Text,
            "unet": UNet,
            "vae_decoder": VAE,
        }
        module = networks[component.value]().eval().requires_grad_(False)
        self.change(module)
        return module

    def tokenizer(self, component: Component) -> Tokenizer:
        vocabulary = {**byte_vocabulary(), "<s>": 512, "</s>": 513}
        return Tokenizer.build(
            vocabulary, [], max_length=8, bos_token="<s>", eos_token="</s>", pad_token="</s>"
        )


def toy(change: Callable[[nn.Module], object] = lambda module: None) -> Toy:
    return Toy("toy", Kind.SYNTHETIC, None, {}, SPEC, {}, None, SimpleNamespace(), change=change)  # type: ignore[arg-type]


def config(*profiles: ShapeProfile, dtype: DType = DType.FP32, backend: str = "onnxruntime") -> BuildConfig:
    return BuildConfig(profiles=profiles or (SMALL,), dtype=dtype, backend=backend)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build(toy(), tmp_path_factory.mktemp("one") / "bundle", config())


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    profiles = (SMALL, ShapeProfile(16, 16, 3), ShapeProfile(32, 24, 1))
    return build(toy(), tmp_path_factory.mktemp("several") / "bundle", config(*profiles))


# What is written


def test_a_profile_has_an_engine_with_and_one_without_guidance(one: Bundle) -> None:
    engines = {e.name: (e.component.value, e.profile, e.guided) for e in one.manifest.engines}
    assert engines == {
        "text_encoder": ("text_encoder", None, False),
        "unet_time": ("unet_time", None, False),
        "unet_context": ("unet_context", None, False),
        "unet-1x16x16-guided": ("unet", SMALL, True),
        "unet-1x16x16": ("unet", SMALL, False),
        "vae_decoder-16x16": ("vae_decoder", SMALL, False),
    }
    on_disk = {str(file.relative_to(one.path)) for file in one.path.rglob("*") if file.is_file()}
    assert on_disk == {MANIFEST, *one.manifest.files}
    assert one.path.parent.joinpath("bundle").is_dir() and len([*one.path.parent.iterdir()]) == 1


def test_every_engine_has_its_error_and_what_measured_it(one: Bundle) -> None:
    for engine in one.manifest.engines:
        assert set(engine.error) == {spec.name for spec in engine.outputs}
        assert all(0 <= error < 1e-6 for error in engine.error.values())
        assert engine.verified_with == "onnxruntime f32" and engine.islands == ()


def test_shapes_follow_the_profile_and_text_and_decoder_do_not_follow_the_batch(several: Bundle) -> None:
    shapes = {
        e.name: {spec.name: spec.shape for spec in (*e.inputs, *e.outputs)} for e in several.manifest.engines
    }
    assert len(shapes) == 3 + 3 * 2 + 2
    guided = shapes["unet-3x16x16-guided"]
    assert guided["latents"] == (3, 4, 4, 4) and guided["prediction"] == (6, 4, 4, 4)
    assert guided["context_0"] == (6, 32, 1, 1) and guided["time_0"] == (3, 32, 1, 1)
    assert shapes["unet-1x32x24"]["prediction"] == (1, 4, 8, 6)
    assert shapes["vae_decoder-32x24"] == {"latents": (1, 4, 8, 6), "image": (1, 32, 24, 3)}


def test_profiles_share_their_weights(one: Bundle, several: Bundle) -> None:
    for component in ("unet", "vae_decoder", "text_encoder"):
        name = f"engines/{component}.weights"
        assert several.manifest.files[name] == one.manifest.files[name]
        graphs = [
            several.path / e.forms[Form.ONNX]
            for e in several.manifest.engines
            if e.component.value == component
        ]
        largest = max((p.numel() for p in toy().load(Component(component)).parameters()), default=0)
        assert all(graph.stat().st_size < 4 * largest + 20_000 for graph in graphs)


@pytest.mark.parametrize("name", ON_HOST)
def test_a_build_verifies_with_every_backend(several: Bundle, name: str) -> None:
    assert len([*verify(several, get(name))]) == len(several.manifest.engines)


def test_two_builds_of_one_source_are_the_same_bytes(one: Bundle, tmp_path: Path) -> None:
    again = build(toy(), tmp_path / "bundle", config())
    assert again.manifest.files == one.manifest.files
    first, second = (json.loads((bundle.path / MANIFEST).read_bytes()) for bundle in (one, again))
    for manifest in (first, second):
        del manifest["created"], manifest["digest"]
        for engine in manifest["engines"]:
            del engine["error"]  # measured, and its last digits change from run to run
    assert first == second


def test_the_fingerprint_follows_the_configuration(one: Bundle, several: Bundle) -> None:
    assert one.manifest.fingerprint != several.manifest.fingerprint


def test_no_file_says_who_built_it_or_where(demo_bundle: Path, demo_model: Path) -> None:
    words = {
        str(demo_model.parents[1]),
        str(Path.home()),
        tempfile.gettempdir() + "/",
        "site-packages",
        sys.prefix,
    }
    words |= {word for word in (getpass.getuser(), platform.node()) if len(word) > 4}
    for file in demo_bundle.rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        assert not [word for word in words if word.encode() in data], file
    assert Bundle.open(demo_bundle).manifest.source.name == demo_model.name


def test_licence_texts_travel_with_the_weights(demo_bundle: Path, demo_model: Path) -> None:
    for name in ("LICENSE.md", "OFL.txt"):
        assert (demo_bundle / name).read_bytes() == (demo_model / name).read_bytes()
        assert name in Bundle.open(demo_bundle).manifest.files


def test_the_source_is_hashed(demo_bundle: Path, demo_model: Path) -> None:
    import hashlib

    files = Bundle.open(demo_bundle).manifest.source.files
    assert any(name.startswith("unet/") for name in files)
    for name, sha256 in files.items():
        assert hashlib.sha256((demo_model / name).read_bytes()).hexdigest() == sha256


# What is refused


@pytest.mark.parametrize("profile", [ShapeProfile(18, 16), ShapeProfile(16, 18)])
def test_a_size_off_the_grid_is_refused_before_any_work(tmp_path: Path, profile: ShapeProfile) -> None:
    def loaded(module: nn.Module) -> None:
        raise AssertionError("weights were loaded")

    with pytest.raises(ShapeError, match=r"18 is not a multiple of 4, .* use 16 or 20"):
        build(toy(loaded), tmp_path / "a" / "bundle", config(SMALL, profile))
    assert not any(tmp_path.iterdir())


def test_an_existing_target_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(BuildError, match="exists; choose another -o"):
        build(toy(lambda module: 1 / 0), tmp_path / "bundle", config())


@pytest.mark.parametrize(
    ("heights", "widths", "batches", "expected"),
    [
        ([], [], [], ["1 x 16 x 16"]),
        ([32], [], [1, 4], ["1 x 32 x 16", "4 x 32 x 16"]),
        ([32, 64], [16], [], ["1 x 32 x 16", "1 x 64 x 16"]),
        ([16], [32, 64], [], ["1 x 16 x 32", "1 x 16 x 64"]),
        ([16, 32], [64, 128], [2], ["2 x 16 x 64", "2 x 32 x 128"]),
    ],
)
def test_sizes_pair_up(
    heights: list[int], widths: list[int], batches: list[int], expected: list[str]
) -> None:
    assert [str(profile) for profile in default_profiles(toy(), heights, widths, batches)] == expected


def test_sizes_that_do_not_pair_up_are_refused() -> None:
    with pytest.raises((BuildError, ConfigError), match="2 heights and 3 widths do not pair up"):
        default_profiles(toy(), [16, 32], [16, 32, 64])


# What goes wrong on the way


def poison(kind: type[nn.Module], value: float) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        if isinstance(module, kind):
            next(module.parameters()).view(-1)[0] = value

    return change


@pytest.mark.parametrize(
    ("kind", "value", "where"),
    [
        (
            Text,
            np.nan,
            "text_encoder: weight 'encoder.embedding.weight'",
        ),  # in a row that no test token reads
        (UNet, np.inf, "unet: weight 'unet.conv_in.weight'"),
        (VAE, np.nan, "vae_decoder: weight 'vae.conv.weight'"),
    ],
)
def test_a_broken_weight_is_named(tmp_path: Path, kind: type[nn.Module], value: float, where: str) -> None:
    with pytest.raises(NumericsError, match=f"^{where} has NaN or Inf; ") as error:
        build(toy(poison(kind, value)), tmp_path / "bundle", config())
    assert error.value.exit_code == 1 and not any(tmp_path.iterdir())


def test_a_graph_with_two_weights_swapped_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = build_module.lower

    def swap(program: Any, module: nn.Module, *rest: Any) -> None:
        square = [weight for weight in module.parameters() if weight.shape == (32, 32)]
        if program.component is Component.UNET_CONTEXT:
            square[0].data, square[1].data = square[1].data, square[0].data
        lower(program, module, *rest)

    monkeypatch.setattr(build_module, "lower", swap)
    with pytest.raises(
        AccuracyError, match=r"^unet_context: output 'context_0' is .* away from torch"
    ) as error:
        build(toy(), tmp_path / "bundle", config())
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_end_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(*args: Any) -> None:
        assert any(tmp_path.iterdir())
        raise error

    monkeypatch.setattr(build_module, "lower", fail)
    with pytest.raises(BuildError if error is RuntimeError else error):
        build(toy(), tmp_path / "bundle", config())
    assert not any(tmp_path.iterdir())


def test_a_failure_of_the_exporter_names_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no such operator\nand a page of advice")

    monkeypatch.setattr(build_module, "lower", fail)
    with pytest.raises(BuildError, match=r"^text_encoder: lower: no such operator; nothing was left behind$"):
        build(toy(), tmp_path / "bundle", config())


def test_torch_out_of_memory_is_a_memory_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(build_module, "observe", fail)
    with pytest.raises(MemoryError):
        build(toy(), tmp_path / "bundle", config())
    assert not any(tmp_path.iterdir())


def test_a_source_that_vanishes_is_not_blamed_on_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/elsewhere/model.safetensors")

    monkeypatch.setattr(build_module, "observe", fail)
    with pytest.raises(BuildError, match=r"^/elsewhere/model.safetensors could not be read: No such file"):
        build(toy(), tmp_path / "bundle", config())


@pytest.mark.parametrize(
    "write", [(np, "savez"), (build_module, "lower"), (Path, "write_bytes"), (Tokenizer, "save")]
)
def test_a_full_disk_is_one_line_wherever_it_strikes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: tuple[object, str]
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*write, full)
    with pytest.raises(
        BuildError, match=r"bundle could not be written: No space left on device \([\d.]+ GiB free\)"
    ):
        build(toy(), tmp_path / "bundle", config())
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_command_leaves_no_bundle(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "rt", "build", "synthetic:tiny", "-o", "bundle"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        while not any(tmp_path.glob(".bundle.building-*/engines/*.onnx")):
            assert child.poll() is None, child.communicate()
            time.sleep(0.05)
        child.send_signal(number)
        out, err = child.communicate()
    assert out == "" and not (tmp_path / "bundle").exists()
    if number is not signal.SIGKILL:
        assert (child.returncode, err.strip()) == (130, "error: interrupted")
        assert not any(tmp_path.iterdir())
        return
    assert len([*tmp_path.iterdir()]) == 1
    build(toy(), tmp_path / "bundle", config())
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("before", [False, True])
def test_what_a_build_hides_from_collections_is_shown_again(before: bool) -> None:
    """Also after an error; what others have hidden stays so."""
    gc.unfreeze()
    try:
        if before:
            gc.freeze()
        with pytest.raises(RuntimeError), build_module._frozen():
            assert gc.get_freeze_count() > 0
            raise RuntimeError
        assert (gc.get_freeze_count() > 0) is before
    finally:
        gc.freeze()  # as tests/conftest.py did


# Half precision


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_half_the_size_and_says_how_far_it_is(
    build_bundle: Callable[..., Path], tiny_bundle: Path, dtype: str
) -> None:
    half, full = (
        Bundle.open(build_bundle("synthetic:tiny", dtype=dtype)).manifest,
        Bundle.open(tiny_bundle).manifest,
    )
    assert [engine.name for engine in half.engines] == [engine.name for engine in full.engines]
    for engine, exact in zip(half.engines, full.engines, strict=True):
        assert max(exact.error.values()) < 1e-5
        if engine.component is Component.UNET_TIME:
            assert engine.dtype is DType.FP32 and engine.error == exact.error, "runs once a schedule, in fp32"
            continue
        assert engine.dtype is DType(dtype)
        assert 1e-5 < max(engine.error.values()) < TOLERANCE[DType(dtype)]
        assert engine.islands == (), "nothing in random weights is far from zero"
        assert half.files[engine.weights].size_bytes < 0.65 * full.files[engine.weights].size_bytes


def test_a_decoder_whose_stream_leaves_fp16_is_scaled_into_it(tmp_path: Path) -> None:
    """As SDXL's does, which is otherwise decoded in fp32, or black."""

    def loud(module: nn.Module) -> None:
        if isinstance(module, VAE):
            enter = nn.Conv2d(4, 32, 3, padding=1)
            with torch.no_grad():
                enter.weight.mul_(1e6)
            leave = nn.ConvTranspose2d(32, 3, 4, stride=4)
            module.conv = nn.Sequential(enter, nn.GroupNorm(8, 32), nn.SiLU(), leave)  # type: ignore[assignment]

    manifest = build(toy(loud), tmp_path / "bundle", config(dtype=DType.FP16)).manifest
    rescaled = {e.component for e in manifest.engines if "rescale" in [each.name for each in e.passes]}
    assert rescaled == {Component.VAE_DECODER}
    decoder = next(e for e in manifest.engines if e.component is Component.VAE_DECODER)
    assert not any("reach" in island for island in decoder.islands)
    assert max(decoder.error.values()) < 5e-3


def test_the_tiny_model_opens(tiny_bundle: Path) -> None:
    checkpoint = open_checkpoint("synthetic:tiny")
    assert Bundle.open(tiny_bundle).manifest.config.profiles == default_profiles(checkpoint)


def test_what_a_backend_compiled_while_the_build_ran_it_is_not_part_of_the_bundle(tmp_path: Path) -> None:
    for name in ("cache/onnxruntime-tensorrt/unet-1/graph.engine", "engines/unet.onnx", ".hidden", "LICENSE"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert build_module._files(tmp_path) == ["LICENSE", "engines/unet.onnx"]
