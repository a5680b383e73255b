"""The programs of a model with random weights, as a build has them when it compiles them, without running any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch._inductor.config as inductor
from torch import nn

from rt.backends import Backend
from rt.config import DType
from rt.export.build import BITS
from rt.export.calibrate import Calibration, calibrate
from rt.export.checkpoint import Checkpoint
from rt.export.forms import writer
from rt.export.observe import Observation
from rt.export.passes.cast import HALF, cast
from rt.export.passes.fuse import fuse
from rt.export.passes.layout import channels_last
from rt.export.passes.merge import merge
from rt.export.passes.quantize import quantize
from rt.export.program import Program, narrowed
from rt.export.trace import trace
from rt.export.unet import TIME_ROWS, of_text, split_context, split_time, trace_loop_step, trace_step
from rt.model import Component, ModelSpec
from rt.shapes import ShapeProfile

UNSEEN = Observation(outputs={}, magnitudes={}, logits={}, losses={})
"""Random weights keep everything in range, so nothing stays in fp32."""
EARLY = (Component.UNET_TIME, Component.UNET_CONTEXT)
_PIXELS = (Component.UNET, Component.VAE_DECODER)


def network(component: Component) -> Component:
    """Whose weights a program has."""
    return Component.UNET if component in EARLY else component


def traced(
    component: Component, module: nn.Module, spec: ModelSpec, profile: ShapeProfile, *, guided: bool
) -> Program:
    """One program of `module`, in fp32.

    Args:
        component: The program.
        module: Its network, see `network`.
        spec: The facts of the model.
        profile: One picture of a size.
        guided: Whether the step is the one with guidance.
    """
    match component:
        case Component.UNET_TIME:
            return split_time(trace_step(module, spec, replace(profile, batch_size=TIME_ROWS), {}))[0]
        case Component.UNET_CONTEXT:
            return split_context(trace_step(module, spec, profile, {}))[0]
        case Component.UNET:
            return trace_loop_step(module, spec, profile, {}, guided=guided)
    [program] = trace(component, module, spec, (profile,))
    return program


def in_format(
    program: Program, dtype: DType, backend: Backend, calibration: Calibration | None = None
) -> tuple[Program, DType, nn.Module]:
    """The program as `backend` gets it, the format that it is really in, and what computes it there."""
    if program.component is Component.UNET_TIME:  # costs nothing in fp32, and every step builds on it
        dtype = DType.FP32
    further = writer(backend)
    fuses = program.component in _PIXELS and dtype in HALF and further is not None and further.fuses
    if fuses:
        program = program.rewritten("layout", channels_last).rewritten("fuse", fuse)
    module = program.module
    if calibration is not None:
        module = quantize(program.module, calibration.ranges, calibration.chosen, calibration.bits)
    if fuses:
        module = merge(module)
    if dtype not in HALF:
        return program, dtype, module
    text = of_text(program) if HALF[dtype] is torch.float16 else frozenset()
    given = [i for i, name in enumerate(program.outputs) if name in text]
    return narrowed(program, text), dtype, cast(module, dtype, UNSEEN, given)[0]


def calibrated(step: Program, module: nn.Module, checkpoint: Checkpoint, dtype: DType) -> Calibration | None:
    """What an fp8 build measures, on the CPU; of other formats nothing."""
    if dtype not in BITS or step.component is not Component.UNET:
        return None
    assert step.profile is not None
    early = {
        component: traced(component, module, checkpoint.spec, step.profile, guided=step.guided)
        for component in EARLY
    }
    return calibrate({**early, Component.UNET: step}, checkpoint, BITS[dtype])


@contextmanager
def convolutions_left_to_cudnn() -> Iterator[None]:
    """Where products are timed in every way that inductor knows, Triton's convolutions are not among them.

    On GPUs of today they are hardly ever the fastest, and timing them takes a third of the time.
    """
    with inductor.patch(max_autotune_conv_backends="ATEN"):
        yield
