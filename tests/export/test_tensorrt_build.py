"""Real plans by TensorRT for RTX, without a GPU: every program of the demo model, and a step of SD 1.5's size."""

from __future__ import annotations

import logging
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from rt.backends import Form, get
from rt.backends.tensorrt import RTX
from rt.bundle import Bundle, EngineRecord
from rt.cli.inspect import _describe
from rt.config import BuildConfig, DType
from rt.export import build as build_module
from rt.export.build import build, default_profiles
from rt.export.checkpoint import open_checkpoint
from rt.export.lower import WeightFile, lower
from rt.export.observe import Observation
from rt.export.passes.cast import cast
from rt.export.tensorrt.plan import Options, build_plan
from rt.export.trace import trace
from rt.export.weights import build_empty
from rt.model import Component
from rt.pipeline import Pipeline
from rt.shapes import ShapeProfile
from rt.verify import verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # the builder uses every processor, and so may others
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 is not installed"),
    pytest.mark.skipif(
        not get(RTX.name).available().problem, reason="this machine has a GPU, and would run them"
    ),
]


@pytest.fixture(scope="module")
def bundle(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    checkpoint = open_checkpoint(str(demo_model))
    config = BuildConfig(profiles=default_profiles(checkpoint), dtype=DType.FP16, backend=RTX.name)
    return build(checkpoint, tmp_path_factory.mktemp("rtx") / "bundle", config, quiet=True)


def test_every_program_of_the_demo_model_has_a_plan(bundle: Bundle) -> None:
    for record in bundle.manifest.engines:
        path = record.forms[Form.TENSORRT_RTX]
        assert path == f"engines/{record.name}.tensorrt-rtx.plan"
        weights = sum(spec.size_bytes for name, spec in bundle.manifest.files.items() if name == path)
        assert weights > 1 << 19, "with its weights"
        assert record.files(get(RTX.name)) == [path]
        assert record.files(get("openvino")) == [record.forms[Form.ONNX], record.weights]


def test_what_was_not_run_is_said(bundle: Bundle) -> None:
    for record in bundle.manifest.engines:
        assert record.verified_with == "openvino f32, tensorrt-rtx not run" and record.error
    lines = _describe(bundle.manifest)
    assert max(map(len, lines)) <= 80
    assert "tensorrt-rtx not run" in " ".join(" ".join(lines).split())


def test_the_bundle_runs_where_there_is_no_gpu(bundle: Bundle) -> None:
    assert len([*verify(bundle, get("openvino"))]) == len(bundle.manifest.engines)
    pipe = Pipeline.from_bundle(bundle.path)
    assert pipe.engines.reason.startswith("openvino: ")
    assert "not tensorrt-rtx (needs an NVIDIA GPU" in pipe.engines.reason
    assert pipe("a red heart", num_inference_steps=2, seed=1).images[0].size == (64, 64)


def test_without_an_engine_that_could_check_it_nothing_is_measured(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "ON_HOST", ())
    record: EngineRecord = build_module._verified(bundle.manifest.engines[0], bundle.path, get(RTX.name))
    assert record.accuracy == "not verified: tensorrt-rtx needs an NVIDIA GPU; this machine has none"
    assert bundle.manifest.engines[0].accuracy.endswith(" from torch with openvino f32, tensorrt-rtx not run")


def test_the_build_warns_once(
    demo_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop(*what: object) -> None:
        raise Stop

    monkeypatch.setattr(build_module, "_compile", stop)
    checkpoint = open_checkpoint(str(demo_model))
    config = BuildConfig(profiles=default_profiles(checkpoint), dtype=DType.FP16, backend=RTX.name)
    with caplog.at_level(logging.WARNING, "rt"), pytest.raises(Stop):
        build(checkpoint, tmp_path / "x", config)
    [warning] = caplog.messages
    assert warning.startswith(
        "tensorrt-rtx needs an NVIDIA GPU; this machine has none: what is built for it is not run"
    )


def test_a_step_of_the_size_of_sd15(tmp_path: Path) -> None:
    """The real shapes, 32 x 32 latents, in fp16. All weights are one number, which keeps files and memory small."""
    checkpoint = open_checkpoint("synthetic:sd15")
    unet = build_empty(Component.UNET, checkpoint.configs["unet"]).eval()
    number = torch.full((1,), 0.01)
    for module in unet.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                module._parameters[name] = nn.Parameter(number.expand(weight.shape), requires_grad=False)
    nothing = Observation(
        outputs={}, magnitudes=defaultdict(float), logits=defaultdict(float), losses=defaultdict(float)
    )
    with torch.inference_mode(), WeightFile(tmp_path / "unet.weights") as weights:
        programs = trace(Component.UNET, unet, checkpoint.spec, (ShapeProfile(256, 256),))
        step = next(program for program in programs if program.component is Component.UNET and program.guided)
        lower(step, cast(step.module, DType.FP16, nothing)[0], weights, tmp_path / "step.onnx")
    build_plan(RTX, tmp_path / "step.onnx", tmp_path / "step.plan", Options())
    assert (tmp_path / "step.plan").stat().st_size > 100 << 20
