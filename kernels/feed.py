"""A row's latents for a network: scaled, in its format, and checked.

    out[r] = scale[r] · state[r, position[r] mod RING_X]                                     → T

    state (rows, RING_X + RING_H, elements) and its rings as in `guide_and_step`, position (rows,), scale (rows,)
    → out (rows, elements) in T, broken (rows,)

A row whose scale is 0 is left alone, so a row could join a loop while the others go on; rt begins all rows of a run at
once, with c_in of their first steps. Before decoding the scale is 1: the decoder of a bundle takes latents as the
sampler leaves them. `position` is the counter that was written last, that is `upcoming`. Where a result is NaN or Inf,
in T, and `broken` is 0, it becomes position + 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rt.kernel_image import TensorArgument
from rt.kernels import guide_and_step
from rt.kernels.guide_and_step import RING_H, RING_X
from rt.kernels.spec import Budget, Case, Config, KernelSpec


def reference(
    state: Tensor, position: Tensor, scale: Tensor, out: Tensor, broken: Tensor
) -> tuple[Tensor, Tensor]:
    """In torch; nothing here is Inf in T alone."""
    x = state[torch.arange(len(state), device=state.device), (position % RING_X.value).long()]
    y = torch.where(scale[:, None] == 0, out, scale[:, None] * x)
    wrong = ~y.isfinite().all(1) & (broken == 0)
    return y, torch.where(wrong, position + 1, broken)


@triton.jit
def feed(state, position, scale, elements, out, broken, BLOCK: tl.constexpr):
    """In Triton: a program for `BLOCK` elements of a row."""
    row = tl.program_id(1)
    factor = tl.load(scale + row)
    if factor != 0:
        i = tl.load(position + row)
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < elements
        place = elements.to(tl.int64)
        x = state + (row * (RING_X + RING_H) + i % RING_X) * place
        y = (factor * tl.load(x + at, inside, 0.0)).to(out.dtype.element_ty)
        tl.store(out + row * place + at, y, inside)
        finite = tl.abs(y.to(tl.float32)) < float("inf")
        wrong = tl.min(finite.to(tl.int32), 0) == 0
        tl.store(broken + row, i + 1, wrong & (tl.load(broken + row) == 0))


def config(case: Case) -> Config:
    """Four values a thread."""
    return Config(constants={"BLOCK": 512}, warps=4)


def places(case: Case, generator: torch.Generator) -> Tensor:
    """Every place of the ring."""
    return torch.arange(case.sizes["rows"], dtype=torch.int32)


def scales(case: Case, generator: torch.Generator) -> Tensor:
    """Any values, 0 for the last of several rows."""
    scale = torch.randn(case.sizes["rows"], generator=generator)
    if len(scale) > 1:
        scale[-1] = 0.0
    return scale


def case(rows: int, elements: int, *, dtype: str = "float16") -> Case:
    """Sizes by name."""
    return Case(sizes={"rows": rows, "elements": elements}, dtype=dtype)


SPEC = KernelSpec(
    name="feed",
    kernel=feed,
    inputs=(
        TensorArgument(
            name="state", shape=("rows", str(RING_X.value + RING_H.value), "elements"), dtype="float32"
        ),
        TensorArgument(name="position", shape=("rows",), dtype="int32"),
        TensorArgument(name="scale", shape=("rows",), dtype="float32"),
    ),
    scalars={"elements": "elements"},
    outputs=(
        TensorArgument(name="out", shape=("rows", "elements"), dtype="T"),
        TensorArgument(name="broken", shape=("rows",), dtype="int32"),
    ),
    inplace=frozenset({"out", "broken"}),
    config=config,
    grid=("cdiv(elements, BLOCK)", "rows"),
    bounds=("elements + BLOCK",),
    reference=reference,
    cases=(case(6, 100), case(1, 512, dtype="bfloat16"), case(2, 1300, dtype="float32")),
    workloads={"sd15 512": case(1, 4 * 64 * 64), "sdxl 1024": case(1, 4 * 128 * 128)},
    tolerance={"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6},
    budget=Budget(registers=32, shared_bytes=16),
    examples={"position": places, "scale": scales, "broken": guide_and_step.intact},
)
