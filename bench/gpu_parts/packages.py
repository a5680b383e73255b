"""Packages that were compiled elsewhere: how long each takes as a CUDA graph, and which kind of kernel takes it.

They are there before the first minute on a GPU, where compiling a model takes many. cuDNN either takes the way of
computing a convolution that it deems best, or tries some out when it first meets one. What it chose stays in the
process, so that each of the two has a process of its own.

A dry run compiles one for the CPU, of what a tiny U-Net makes of a text: the smallest of its programs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rt.backends import get
from rt.bench.gpu_parts.model import Model
from rt.bench.gpu_parts.package import Package, write
from rt.bench.gpu_parts.part import Context, Figures
from rt.bench.gpu_parts.place import Place, find, trying_convolutions
from rt.bench.gpu_parts.programs import in_format, traced
from rt.bench.gpu_parts.settings import SETTINGS, STEP
from rt.bench.gpu_parts.trace import kinds, record
from rt.config import DType
from rt.errors import CheckpointError
from rt.model import Component

_ROUNDS, _LONGEST = 9, 12


def run(context: Context, tried: bool) -> Iterator[Figures]:
    """See the module. `packages`, a row each, also where it raises.

    Args:
        context: Of the run.
        tried: Whether cuDNN tries convolutions out.

    Raises:
        CheckpointError: There is none.
    """
    place = find(context)
    folder = folder_of(context, place)
    found = sorted(path.parents[1] for path in folder.glob("*/engines/*.pt2"))
    if not found:
        raise CheckpointError(f"{folder} has no package; make some with --prepare {folder}")
    rows: list[dict[str, Any]] = []
    for each in found:
        try:
            with trying_convolutions(tried):
                rows.append({"package": each.name, **_timed(each, place, context)})
        except Exception as error:  # of a driver or a library; the other packages still count
            if "CUDA error" in str(error):  # nothing more can be had from this process
                raise
            first = str(error).strip().partition("\n")[0]
            rows.append({"package": each.name, "problem": f"{type(error).__name__}: {first}"})
        yield {"tried": tried, "packages": rows}


def folder_of(context: Context, place: Place) -> Path:
    """Where they are.

    Raises:
        CheckpointError: Nobody said.
    """
    if context.packages is not None:
        return context.packages
    if not place.dry:
        raise CheckpointError("there are no packages; say where with --packages")
    folder = context.scratch / "packages"
    write(folder / STEP, *step_of(context, place), place, max_autotune=False)
    return folder


def step_of(context: Context, place: Place) -> tuple[Any, Any]:
    """The guided step of SD 1.5 in its format, traced here: program and module."""
    setting = SETTINGS["sd15"].tiny() if place.dry else SETTINGS["sd15"]
    model = Model(setting=setting, place=place, seed=context.seed)
    with torch.inference_mode():
        unet = model.checkpoint.load(Component.UNET)
        component = Component.UNET_CONTEXT if place.dry else Component.UNET
        program = traced(component, unet, model.checkpoint.spec, model.profile, guided=True)
        dtype, name = (DType.FP32, "inductor-cpu") if place.dry else (DType.FP16, "inductor")
        program, _, module = in_format(program, dtype, get(name))
    return program, module


def _timed(folder: Path, place: Place, context: Context) -> dict[str, Any]:
    started = time.perf_counter()
    held = place.used_gib()
    package = Package(folder, place, context.seed)
    finite = all(bool(output.isfinite().all()) for output in package.run())
    replay = package.graph()
    replay()
    place.wait()
    ready_s = time.perf_counter() - started
    row = {"ready_s": ready_s, "held_gib": place.used_gib() - held, "finite": finite}
    samples = place.compare({"step": replay}, _ROUNDS)["step"]
    events = record(replay, context.scratch / "traces" / f"{folder.name}.json")
    return {**row, "time": samples.to_json(), **kinds(events, longest=_LONGEST)}
