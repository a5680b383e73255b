"""On a stand-in GPU: what a build for one compiles, links and packages, and how much it launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rt.backends import Form
from rt.backends.inductor import About
from rt.bench.stand_in_gpu.launches import launches
from rt.bench.stand_in_gpu.packages import prepare
from rt.bundle import Bundle
from rt.errors import ConfigError
from rt.export import toolchain
from rt.model import Component

PYTHON = os.environ.get("RT_STAND_IN_PYTHON", "")
"""Of an environment with the torch that a GPU's machine has, see CONTRIBUTING.md."""


def has_headers() -> bool:
    try:
        return bool(toolchain.cuda_home())
    except Exception:
        return False


needs_headers = pytest.mark.skipif(not has_headers(), reason="CUDA's headers are not installed")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_headers
def test_a_build_in_fp16_takes_the_gpu_and_draws_what_the_processor_draws(tmp_path: Path) -> None:
    """With torch alone, `rt build --fp16` and `rt run`, neither told of a backend."""
    script, bundle = str(Path(__file__).with_name("on_stand_in.py")), tmp_path / "bundle"
    size = ("--height", "64", "--width", "64")
    said = run(sys.executable, script, "build", "synthetic:tiny", "--fp16", *size, "-o", str(bundle))
    counted = json.loads(said.splitlines()[-1])["launches"]
    assert {"attention", "self_attention", "group_norm", "group_statistics"} <= counted.keys()
    manifest = Bundle.open(bundle).manifest
    assert manifest.config.backend == "inductor"
    for record in manifest.engines:
        about = About.read(bundle / record.forms[Form.INDUCTOR.value])
        assert (about.capability, about.file) == (90, f"{record.weights.rpartition('/')[2]}")
    [step, *_] = [each for each in manifest.engines if each.component is Component.UNET and each.guided]
    assert {spec.dtype for spec in step.inputs if spec.name.startswith("context_")} == {"float16"}

    pictures = {}
    for name, program in (("gpu", (sys.executable, script)), ("host", (sys.executable, "-m", "rt"))):
        target = tmp_path / f"{name}.png"
        backend = ("--backend", "openvino") if name == "host" else ()
        run(
            *program,
            "run",
            str(bundle),
            "--prompt",
            "a cat",
            "--steps",
            "3",
            "--seed",
            "5",
            *backend,
            "-o",
            str(target),
        )
        pictures[name] = np.asarray(Image.open(target)).astype(int)
    assert pictures["gpu"].std() > 10
    assert np.abs(pictures["gpu"] - pictures["host"]).max() <= 2


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="RT_STAND_IN_PYTHON names no Python with the torch of a GPU's machine")
@pytest.mark.parametrize(
    ("program", "most"),
    [
        ("sd15-step", 450),
        ("sd15-step-fused", 400),
        ("sd15-decoder", 150),
        ("sdxl-step", 1050),
        ("sdxl-step-fused", 900),
        ("sdxl-decoder", 160),
        ("sdxl-step-fp8", 1450),
        ("sdxl-turbo-step", 1050),
    ],
)
def test_programs_of_real_shape_are_packages_of_so_many_launches(
    tmp_path: Path, program: str, most: int
) -> None:
    described: Any = json.loads(run(PYTHON, "-m", "rt.bench.stand_in_gpu.packages", str(tmp_path), program))
    assert 50 < described["launches"] <= most
    [package] = (tmp_path / program / "engines").glob("*.pt2")
    about = About.read(package)
    assert about.capability == 90 and about.weights
    inputs = json.loads((tmp_path / program / "inputs.json").read_text())["inputs"]
    assert ["latents", *inputs[0][1:]] == inputs[0]


def test_launches_are_read_from_the_code() -> None:
    code = """
static inline void call_triton_poi_fused_add_0(
    const handle& in_ptr0) {
    launchKernel(kernels_.triton_poi_fused_add_0, grid_0, 1, 1, 4, 0, kernel_args_, stream_);
}
void Model::run_impl() {
    call_triton_poi_fused_add_0(buf0, stream, kernels, this->cubin_dir_);
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(buf1, buf0, a, b, 1L, 1L));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_convolution(buf1, w, nullptr));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda__scaled_dot_product_cudnn_attention(q, k, v));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, x));
    call_group_norm_12(buf1, stream);
    call_triton_per_fused_native_layer_norm_view_4(buf2, stream);
"""
    assert dict(launches(code)) == {
        "elementwise": 1,
        "product": 1,
        "convolution": 1,
        "scaled_dot_product_cudnn_attention": 1,
        "group_norm": 1,
        "reduction": 1,
    }


def test_a_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^no program 'sd15-stop' \(did you mean 'sd15-step'\?\); there are: sd15-step, "
    ):
        next(prepare(tmp_path, ["sd15-stop"]))
