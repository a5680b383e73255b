"""Guidance, the sampler's step, its history and the next input of the network, for any sampler and all rows of a batch.

    m   = m_uncond + g · (m_cond − m_uncond),  times a factor (`guidance_rescale`, or 1)
    h   = p · x + q · m
    x'  = Σ_k weight[k] · x_k + Σ_k weight[RING_X + k] · h_k + n · z          over the places of the rings
    in' = feed · x'                                                          → T

    prediction (sides · rows, elements) in T: the unconditional rows, then the conditional ones; or those alone
    table (rows, steps, COLUMNS), a row's own coefficients; length (rows,): how many of its steps are real
    noise (rows, draws, elements): that of step i is in place i mod draws, and not read where n is 0
    state (rows, RING_X + RING_H, elements): x_i is in place i mod RING_X, h_i in RING_X + i mod RING_H
    latents (rows, elements) in T

It is rt/trajectory.py for a batch; rt/samplers/packed.py fills the table. All arithmetic is in fp32.

Each row has its own position. This kernel reads `position` and writes `upcoming`; `select_rows`, which begins the next
step, reads `upcoming` and writes `position`. So no program reads what another one of the same launch writes. A row at
its end is left alone: state, latents and counter stay.

`broken` (rows,) is 0 until the first x' that is NaN or Inf, then that step's number from 1. The host reads it when it
likes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rt.kernel_image import TensorArgument
from rt.kernels.spec import Budget, Case, Config, KernelSpec

RING_X, RING_H = tl.constexpr(4), tl.constexpr(5)
GUIDANCE, RESCALE, P, Q, N, FEED, WEIGHTS = (tl.constexpr(column) for column in range(7))
COLUMNS = tl.constexpr(WEIGHTS + RING_X + RING_H)


def guided(prediction: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor]:
    """The conditional prediction (rows, elements), and m without its factor, for `guidance` (rows, 1)."""
    rows = len(guidance)
    cond, uncond = prediction[-rows:], prediction[:rows]
    return cond, torch.where(guidance == 1, cond, uncond + guidance * (cond - uncond))


def reference(
    prediction: Tensor,
    factor: Tensor,
    table: Tensor,
    length: Tensor,
    position: Tensor,
    noise: Tensor,
    state: Tensor,
    latents: Tensor,
    broken: Tensor,
) -> tuple[Tensor, ...]:
    """In torch, row by row."""
    upcoming, latents, state, broken = position.clone(), latents.clone(), state.clone(), broken.clone()
    rows = range(len(position))
    for row, i in zip(rows, position.tolist(), strict=True):
        if i >= length[row]:
            continue
        c = table[row, i]
        m = guided(prediction[row :: len(rows)], c[GUIDANCE.value].reshape(1, 1))[1][0] * factor[row]
        h = c[P.value] * state[row, i % RING_X.value] + c[Q.value] * m
        state[row, RING_X.value + i % RING_H.value] = h
        x = c[WEIGHTS.value :] @ state[row]
        if c[N.value] != 0:
            x = x + c[N.value] * noise[row, i % noise.shape[1]]
        state[row, (i + 1) % RING_X.value] = x
        latents[row] = c[FEED.value] * x
        upcoming[row] = i + 1
        if not x.isfinite().all() and broken[row] == 0:
            broken[row] = i + 1
    return state, latents, upcoming, broken


@triton.jit
def load_guided(prediction, row, rows, sides, elements, at, inside, guidance):
    """The conditional prediction of a row at the elements `at`, and m without its factor; zeros outside."""
    uncond = tl.load(prediction + row * elements + at, inside, 0.0).to(tl.float32)
    cond = tl.load(prediction + ((sides - 1) * rows + row) * elements + at, inside, 0.0).to(tl.float32)
    return cond, tl.where(guidance == 1, cond, uncond + guidance * (cond - uncond))


@triton.jit
def guide_and_step(
    prediction,
    factor,
    table,
    length,
    position,
    noise,
    rows,
    sides,
    steps,
    draws,
    elements,
    state,
    latents,
    upcoming,
    broken,
    BLOCK: tl.constexpr,
):
    """In Triton: a program for `BLOCK` elements of a row."""
    row = tl.program_id(1)
    i = tl.load(position + row)
    running = i < tl.load(length + row)
    if tl.program_id(0) == 0:
        tl.store(upcoming + row, i + running.to(tl.int32))
    if running:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < elements
        c = table + (row * steps + i) * COLUMNS
        x = state + row.to(tl.int64) * ((RING_X + RING_H) * elements) + at
        h = x + RING_X * elements

        _, m = load_guided(prediction, row, rows, sides, elements, at, inside, tl.load(c + GUIDANCE))
        m *= tl.load(factor + row)
        new_h = tl.load(c + P) * tl.load(x + i % RING_X * elements, inside) + tl.load(c + Q) * m
        tl.store(h + i % RING_H * elements, new_h, inside)

        # What has no weight is not read: it may be left over from another run, and noise may never have been drawn.
        n = tl.load(c + N)
        z = noise + (row.to(tl.int64) * draws + i % draws) * elements + at
        new_x = n * tl.load(z, at < tl.where(n != 0, elements, 0), 0.0)
        for k in tl.static_range(RING_X):
            weight = tl.load(c + WEIGHTS + k)
            new_x += weight * tl.load(x + k * elements, at < tl.where(weight != 0, elements, 0), 0.0)
        for k in tl.static_range(RING_H):
            weight = tl.load(c + WEIGHTS + RING_X + k)
            is_new = i % RING_H == k
            needed = tl.where(is_new, 0, tl.where(weight != 0, elements, 0))
            new_x += weight * tl.where(is_new, new_h, tl.load(h + k * elements, at < needed, 0.0))
        tl.store(x + (i + 1) % RING_X * elements, new_x, inside)
        tl.store(
            latents + row * elements + at, (tl.load(c + FEED) * new_x).to(latents.dtype.element_ty), inside
        )

        # All programs of a row that find fault write the same number, so their order does not matter.
        finite = (tl.abs(new_x) < float("inf")) | (at >= elements)
        wrong = tl.min(finite.to(tl.int32), 0) == 0
        tl.store(broken + row, i + 1, wrong & (tl.load(broken + row) == 0))


def config(case: Case) -> Config:
    """Small blocks: latents are few, and every program has a long chain of loads to wait for."""
    return Config(constants={"BLOCK": 256}, warps=2)


def places(case: Case, generator: torch.Generator) -> Tensor:
    """A position a row, from 1; some are at the end."""
    return (torch.arange(case.sizes["rows"], dtype=torch.int32) * 2 + 1) % (case.sizes["steps"] + 1)


def lengths(case: Case, generator: torch.Generator) -> Tensor:
    """Steps a row: one is short."""
    length = torch.full((case.sizes["rows"],), case.sizes["steps"], dtype=torch.int32)
    length[-1] -= 1
    return length


def coefficients(case: Case, generator: torch.Generator) -> Tensor:
    """Any values, with a third of the steps unguided and a third without noise."""
    shape = case.sizes["rows"], case.sizes["steps"], COLUMNS.value
    table = torch.randn(shape, generator=generator)
    table[:, 2::3, GUIDANCE.value] = 1.0
    table[:, 2::3, RESCALE.value] = 0.0
    table[:, 1::3, N.value] = 0.0
    return table


def intact(case: Case, generator: torch.Generator) -> Tensor:
    """No fault so far, but in the first of several rows."""
    broken = torch.zeros(case.sizes["rows"], dtype=torch.int32)
    if len(broken) > 1:
        broken[0] = 7
    return broken


def case(
    rows: int, sides: int, elements: int, *, steps: int = 7, draws: int = 2, dtype: str = "float16"
) -> Case:
    """Sizes by name."""
    sizes = {"rows": rows, "sides": sides, "steps": steps, "draws": draws, "elements": elements}
    return Case(sizes=sizes, dtype=dtype)


SPEC = KernelSpec(
    name="guide_and_step",
    kernel=guide_and_step,
    inputs=(
        TensorArgument(name="prediction", shape=("sides * rows", "elements"), dtype="T"),
        TensorArgument(name="factor", shape=("rows",), dtype="float32"),
        TensorArgument(name="table", shape=("rows", "steps", str(COLUMNS.value)), dtype="float32"),
        TensorArgument(name="length", shape=("rows",), dtype="int32"),
        TensorArgument(name="position", shape=("rows",), dtype="int32"),
        TensorArgument(name="noise", shape=("rows", "draws", "elements"), dtype="float32"),
    ),
    scalars={name: name for name in ("rows", "sides", "steps", "draws", "elements")},
    outputs=(
        TensorArgument(
            name="state", shape=("rows", str(RING_X.value + RING_H.value), "elements"), dtype="float32"
        ),
        TensorArgument(name="latents", shape=("rows", "elements"), dtype="T"),
        TensorArgument(name="upcoming", shape=("rows",), dtype="int32"),
        TensorArgument(name="broken", shape=("rows",), dtype="int32"),
    ),
    inplace=frozenset({"state", "latents", "broken"}),
    config=config,
    grid=("cdiv(elements, BLOCK)", "rows"),
    bounds=(
        f"{RING_X.value + RING_H.value} * elements",
        "sides * rows * elements",
        f"{COLUMNS.value} * rows * steps",
    ),
    reference=reference,
    cases=(
        case(1, 1, 64),
        case(1, 2, 1000),
        case(5, 2, 300, dtype="bfloat16"),
        case(5, 2, 256, draws=1, dtype="float32"),
        case(3, 1, 777, draws=7),
    ),
    workloads={
        "sd15 512": case(1, 2, 4 * 64 * 64, steps=50, draws=1),
        "sd15 512 by 8": case(8, 2, 4 * 64 * 64, steps=50, draws=1),
        "sdxl 1024": case(1, 2, 4 * 128 * 128, steps=50, draws=1),
    },
    tolerance={"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5},
    budget=Budget(registers=64, shared_bytes=16),
    examples={"table": coefficients, "length": lengths, "position": places, "broken": intact},
)
