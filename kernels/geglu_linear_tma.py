"""`geglu_linear` for capability 9.0 on, with the tensor memory accelerator and programs that stay.

A thread asks for a tile of x or W by its coordinates and none computes addresses; both halves of W are one tile of
three dimensions. As many programs as processors, or twice as many, go through the tiles of y; inductor's and Triton's
host code make the descriptors. One loop goes through all steps of all tiles, so that the first steps of a tile are
loaded during the last of the one before and while its GELU is computed.

It is a kernel of its own because descriptors made on the device need scratch memory, of which torch before 2.13 gives
a package that of one program alone, and neither TensorRT nor our launcher passes any, or a descriptor.

https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TENSOR__MEMORY.html
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from rt.kernel_image import TensorArgument
from rt.kernels import geglu_linear
from rt.kernels.geglu_linear import _gelu
from rt.kernels.spec import Budget, Case, Config

H200_PROCESSORS = 132


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    """In torch; `weight` is (2, features, inner)."""
    return geglu_linear.reference(x, weight.flatten(0, 1), bias)


@triton.jit
def geglu_linear_tma(
    x,
    weight,
    bias,
    rows,
    y,
    inner: tl.constexpr,
    features: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    INNER: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """In Triton: a program every `PROGRAMS`th tile of y, in the order of `geglu_linear`."""
    tiles: tl.constexpr = (features + FEATURES - 1) // FEATURES
    bands = tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), bands * tiles, PROGRAMS, flatten=True):
        first = tile // (8 * tiles) * 8
        height = tl.minimum(bands - first, 8)
        within = tile % (8 * tiles)
        row = (first + within % height) * ROWS
        start_feature = within // height * FEATURES
        sums = tl.zeros((ROWS, 2 * FEATURES), tl.float32)
        for start in range(0, inner, INNER):
            a = x.load([row, start])
            b = weight.load([0, start_feature, start]).reshape(2 * FEATURES, INNER)
            sums = tl.dot(a, b.T, sums)
        hidden, gate = sums.reshape(ROWS, 2, FEATURES).permute(0, 2, 1).split()
        feature = start_feature + tl.arange(0, FEATURES)
        inside = feature < features
        hidden += tl.load(bias + feature, inside, 0.0).to(tl.float32)[None, :]
        gate += tl.load(bias + features + feature, inside, 0.0).to(tl.float32)[None, :]
        value = (hidden * _gelu(gate)).to(y.dtype)
        if FEATURES == 128:  # 128 bytes a row are the most that a descriptor moves
            left, right = value.reshape(ROWS, 2, 64).permute(0, 2, 1).split()
            y.store([row, start_feature], left)
            y.store([row, start_feature + 64], right)
        else:
            y.store([row, start_feature], value)


def config(case: Case) -> Config:
    """The tiles of `geglu_linear` on a Hopper; one program a processor, or two of half the size."""
    chosen = geglu_linear.hopper_config(case)
    alone = chosen.constants["FEATURES"] == 128
    return replace(chosen, constants={**chosen.constants, "PROGRAMS": processors() * (1 if alone else 2)})


def halves(case: Case, generator: torch.Generator) -> Tensor:
    """The weights of `geglu_linear`, by half."""
    return geglu_linear.small_weights(case, generator).view(2, -1, case.sizes["inner"])


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What diffusers runs."""
    return reference(x, weight, bias)[0]


def processors() -> int:
    """Of the GPU here, of an H200 if there is none; few in the interpreter, so that each has several tiles."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).multi_processor_count)
    return 2 if knobs.runtime.interpret else H200_PROCESSORS


_POINTERS = geglu_linear.SPEC.hopper
assert _POINTERS is not None
SPEC = replace(
    _POINTERS,
    name="geglu_linear_tma",
    kernel=geglu_linear_tma,
    inputs=(
        TensorArgument(name="x", shape=("rows", "inner"), dtype="T"),
        TensorArgument(name="weight", shape=("2", "features", "inner"), dtype="T"),
        TensorArgument(name="bias", shape=("2 * features",), dtype="T"),
    ),
    config=config,
    grid=("min(cdiv(rows, ROWS) * cdiv(features, FEATURES), PROGRAMS)",),
    reference=reference,
    cases=(
        *_POINTERS.cases,
        geglu_linear.case(77, 96, 64),  # half a step of the inner dimension
        geglu_linear.case(9 * 128, 64, 128),  # a second group of bands, with one band
    ),
    descriptors={"x": ("ROWS", "INNER"), "weight": ("2", "FEATURES", "INNER"), "y": ("ROWS", "64")},
    budget=Budget(registers=200, shared_bytes=214016),
    examples={"weight": halves},
    alternatives={"eager": eager},
)
