"""The factor that gives a guided prediction back the deviation of the conditional one.

    factor = φ · std(m_cond) / std(m) + 1 − φ,     m = m_uncond + g · (m_cond − m_uncond)

    prediction (sides · rows, elements) in T, the rest as in `guide_and_step`, which multiplies m by it → factor (rows,)

A loop without rescale leaves this kernel out and keeps the factors at 1. A program has a whole row and goes over it
twice, for the means and for the squares around them; a row is some 100 KB, so the second time it comes from cache.

Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", https://arxiv.org/abs/2305.08891, 3.4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rt.kernel_image import TensorArgument
from rt.kernels import guide_and_step
from rt.kernels.guide_and_step import COLUMNS, GUIDANCE, RESCALE, guided, load_guided
from rt.kernels.spec import Budget, Case, Config, KernelSpec


def reference(prediction: Tensor, table: Tensor, length: Tensor, position: Tensor) -> tuple[Tensor]:
    """In torch."""
    at = torch.minimum(position, length - 1)
    c = table[torch.arange(len(position)), at]
    cond, m = guided(prediction, c[:, GUIDANCE.value, None])
    phi = c[:, RESCALE.value]
    factor = phi * cond.std(1, correction=0) / m.std(1, correction=0) + 1 - phi
    return (torch.where(position < length, factor, 1.0),)


@triton.jit
def guidance_rescale(
    prediction, table, length, position, rows, sides, steps, elements, factor, BLOCK: tl.constexpr
):
    """In Triton: a program a row."""
    row = tl.program_id(0)
    i = tl.load(position + row)
    running = i < tl.load(length + row)
    c = table + (row * steps + tl.where(running, i, 0)) * COLUMNS
    guidance, phi = tl.load(c + GUIDANCE), tl.load(c + RESCALE)
    result = 1.0
    if running & (phi != 0):
        sum_cond = tl.zeros((BLOCK,), tl.float32)
        sum_m = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, elements, BLOCK):
            at = start + tl.arange(0, BLOCK)
            cond, m = load_guided(prediction, row, rows, sides, elements, at, at < elements, guidance)
            sum_cond += cond
            sum_m += m
        mean_cond, mean_m = tl.sum(sum_cond, 0) / elements, tl.sum(sum_m, 0) / elements
        square_cond = tl.zeros((BLOCK,), tl.float32)
        square_m = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, elements, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < elements
            cond, m = load_guided(prediction, row, rows, sides, elements, at, inside, guidance)
            cond = tl.where(inside, cond - mean_cond, 0.0)
            m = tl.where(inside, m - mean_m, 0.0)
            square_cond += cond * cond
            square_m += m * m
        result = phi * tl.sqrt(tl.sum(square_cond, 0) / tl.sum(square_m, 0)) + 1 - phi
    tl.store(factor + row, result)


def config(case: Case) -> Config:
    """A block of the size of an SM's: there is no other program to share it with."""
    return Config(constants={"BLOCK": min(4096, triton.next_power_of_2(case.sizes["elements"]))}, warps=16)


def off_centre(case: Case, generator: torch.Generator) -> Tensor:
    """Predictions with a mean of three deviations, which E[m²] − E[m]² would not survive in half as well."""
    shape = case.sizes["sides"] * case.sizes["rows"], case.sizes["elements"]
    return 3.0 + torch.randn(shape, generator=generator)


def case(rows: int, sides: int, elements: int, *, steps: int = 7, dtype: str = "float16") -> Case:
    """Sizes by name."""
    sizes = {"rows": rows, "sides": sides, "steps": steps, "elements": elements}
    return Case(sizes=sizes, dtype=dtype)


SPEC = KernelSpec(
    name="guidance_rescale",
    kernel=guidance_rescale,
    inputs=(
        TensorArgument(name="prediction", shape=("sides * rows", "elements"), dtype="T"),
        TensorArgument(name="table", shape=("rows", "steps", str(COLUMNS.value)), dtype="float32"),
        TensorArgument(name="length", shape=("rows",), dtype="int32"),
        TensorArgument(name="position", shape=("rows",), dtype="int32"),
    ),
    scalars={name: name for name in ("rows", "sides", "steps", "elements")},
    outputs=(TensorArgument(name="factor", shape=("rows",), dtype="float32"),),
    config=config,
    grid=("rows",),
    bounds=("sides * rows * elements", "elements + BLOCK", f"{COLUMNS.value} * rows * steps"),
    reference=reference,
    cases=(
        case(1, 2, 1000),
        case(1, 1, 64),
        case(5, 2, 4100, dtype="bfloat16"),
        case(4, 2, 9000, dtype="float32"),
    ),
    workloads={
        "sd15 512": case(1, 2, 4 * 64 * 64, steps=50),
        "sdxl 1024": case(1, 2, 4 * 128 * 128, steps=50),
    },
    tolerance=dict.fromkeys(("float16", "bfloat16", "float32"), 1e-5),
    budget=Budget(registers=64, shared_bytes=64),
    examples={
        "prediction": off_centre,
        "table": guide_and_step.coefficients,
        "length": guide_and_step.lengths,
        "position": guide_and_step.places,
    },
)
