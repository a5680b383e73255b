"""Programs of real shape without a byte of weights, as a build would hand them to inductor."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rt.backends import get
from rt.bench.gpu_parts.programs import in_format, traced
from rt.config import DType
from rt.export.architectures import ARCHITECTURES
from rt.export.calibrate import Calibration
from rt.export.facts import FOLDERS, read_spec
from rt.export.passes.quantize import FP8, Range, products
from rt.export.program import Program
from rt.export.weights import build
from rt.model import Component
from rt.shapes import ShapeProfile


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A program.

    Attributes:
        architecture: Of `rt.export.architectures`.
        side: Of the picture, in pixels.
        component: `UNET`, the step with guidance, or `VAE_DECODER`.
        guided: Whether the step is one with guidance.
        fused: Whether linear layers are computed by kernels of ours where those save a launch.
        dtype: Of the build.
    """

    architecture: str
    side: int
    component: Component
    guided: bool = False
    fused: bool = False
    dtype: DType = DType.FP16


_SD15 = Wanted(architecture="sd15", side=512, component=Component.UNET, guided=True)
_SDXL = Wanted(architecture="sdxl", side=1024, component=Component.UNET, guided=True)
PROGRAMS = {
    "sd15-step": _SD15,
    "sd15-decoder": Wanted(architecture="sd15", side=512, component=Component.VAE_DECODER),
    "sdxl-step": _SDXL,
    "sdxl-decoder": Wanted(architecture="sdxl", side=1024, component=Component.VAE_DECODER),
    "sdxl-turbo-step": Wanted(architecture="sdxl", side=512, component=Component.UNET),
    "sd15-step-fused": replace(_SD15, fused=True),
    "sdxl-step-fused": replace(_SDXL, fused=True),
    "sdxl-step-fp8": replace(_SDXL, dtype=DType.FP8),
    "tiny-step-fp8": Wanted(
        architecture="tiny", side=64, component=Component.UNET, guided=True, dtype=DType.FP8
    ),
    "tiny-step": Wanted(architecture="tiny", side=64, component=Component.UNET, guided=True),
    "tiny-decoder": Wanted(architecture="tiny", side=64, component=Component.VAE_DECODER),
}


def lowered(wanted: Wanted, mode: FakeTensorMode) -> tuple[Program, nn.Module]:
    """The program as a build in fp16 compiles it, and the module that computes it, their weights fake."""
    configs = ARCHITECTURES[wanted.architecture].configs
    factor = read_spec(configs, wanted.architecture).vae_scale_factor
    configs["unet"] = {**configs["unet"], "sample_size": wanted.side // factor}
    spec, profile = read_spec(configs, wanted.architecture), ShapeProfile(wanted.side, wanted.side)
    with mode:
        network = build(wanted.component, configs[FOLDERS[wanted.component]]).eval().requires_grad_(False)
        program = traced(wanted.component, network, spec, profile, guided=wanted.guided)
        calibration = _as_measured(program) if wanted.dtype is DType.FP8 else None
        program, _, module = in_format(program, wanted.dtype, get("inductor"), calibration)
        return program, module


def _as_measured(program: Program) -> Calibration:
    """Every layer in eight bits, all of one range."""
    names = products(program.module, FP8)
    return Calibration(bits=FP8, ranges=dict.fromkeys(names, Range(-1.0, 1.0)), kept={})
