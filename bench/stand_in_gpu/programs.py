"""Programs of real shape without a byte of weights, as a build would hand them to inductor."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rt.config import DType
from rt.export.architectures import ARCHITECTURES
from rt.export.facts import FOLDERS, read_spec
from rt.export.observe import Observation
from rt.export.passes.cast import cast
from rt.export.passes.fuse import fuse
from rt.export.passes.layout import channels_last
from rt.export.passes.merge import merge
from rt.export.passes.sink import sink
from rt.export.program import Program, narrowed
from rt.export.trace import trace
from rt.export.unet import split_context, split_time, trace_step
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
    """

    architecture: str
    side: int
    component: Component
    guided: bool = False
    fused: bool = False


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
    "tiny-step": Wanted(architecture="tiny", side=64, component=Component.UNET, guided=True),
    "tiny-decoder": Wanted(architecture="tiny", side=64, component=Component.VAE_DECODER),
}


def lowered(wanted: Wanted, mode: FakeTensorMode) -> tuple[Program, nn.Module]:
    """The program as a build in fp16 compiles it, and the module that computes it, their weights fake.

    Nothing is known of their values, so nothing is kept in fp32.
    """
    configs = ARCHITECTURES[wanted.architecture].configs
    factor = read_spec(configs, wanted.architecture).vae_scale_factor
    configs["unet"] = {**configs["unet"], "sample_size": wanted.side // factor}
    spec = read_spec(configs, wanted.architecture)
    profile = ShapeProfile(wanted.side, wanted.side)
    with mode:
        network = build(wanted.component, configs[FOLDERS[wanted.component]]).eval().requires_grad_(False)
        if wanted.component is not Component.UNET:
            [program] = trace(wanted.component, network, spec, (profile,))
            return in_half(program)
        step = trace_step(network, spec, profile, {}, guided=wanted.guided)
        context, step = split_context(step.rewritten("sink", sink) if wanted.guided else step)
        return in_half(split_time(step)[1], narrow=context.outputs)


def in_half(program: Program, narrow: Collection[str] = ()) -> tuple[Program, nn.Module]:
    """Fused and in fp16, the inputs of these names, too."""
    for name, rewrite in (("layout", channels_last), ("fuse", fuse), ("merge", merge)):
        program = program.rewritten(name, rewrite)
    nothing = Observation(outputs={}, magnitudes={}, logits={}, losses={})
    module, _ = cast(program.module, DType.FP16, nothing)
    return narrowed(program, narrow), module
