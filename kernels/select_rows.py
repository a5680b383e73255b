"""The beginning of a step: each row's counter, and all that its timestep gave, copied to where the network reads it.

    position[r] = upcoming[r]
    out[e] = table[min(upcoming[owner[e]], steps − 1), e]

    table (steps, elements) in T, owner (elements,), upcoming (rows,) → out (elements,) in T, position (rows,)

`out` is a stretch of memory that holds buffers of the network that change with the timestep, side by side; line i of
the table is what it holds when all rows are at step i. An element belongs to the row `owner`, so the kernel need not
know whether both sides of a row share features, or how many buffers there are. Each stretch takes a launch. One holds
all buffers where the engine allocated them in one block without gaps, and a single one where each was allocated by
itself: then a step of SD 1.5 has 22 launches, of which every one writes the same counters. `guide_and_step` says why
there are two. A row at its end keeps its last features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rt.kernel_image import TensorArgument
from rt.kernels.spec import Budget, Case, Config, KernelSpec


def reference(table: Tensor, owner: Tensor, upcoming: Tensor) -> tuple[Tensor, Tensor]:
    """In torch."""
    line = upcoming.clamp(max=len(table) - 1)[owner.long()].long()
    return table.gather(0, line[None])[0], upcoming


@triton.jit
def select_rows(table, owner, upcoming, rows, steps, elements, out, position, BLOCK: tl.constexpr):
    """In Triton: a program for `BLOCK` elements; the first also moves the counters."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    line = tl.load(upcoming + tl.load(owner + at, inside, 0), inside, 0)
    line = tl.minimum(line, steps - 1).to(tl.int64)
    tl.store(out + at, tl.load(table + line * elements + at, inside), inside)
    if tl.program_id(0) == 0:
        for start in range(0, rows, BLOCK):
            row = start + tl.arange(0, BLOCK)
            tl.store(position + row, tl.load(upcoming + row, row < rows), row < rows)


def config(case: Case) -> Config:
    """Eight values a thread."""
    return Config(constants={"BLOCK": 1024}, warps=4)


def owners(case: Case, generator: torch.Generator) -> Tensor:
    """Any row an element."""
    sizes = case.sizes
    return torch.randint(sizes["rows"], (sizes["elements"],), generator=generator, dtype=torch.int32)


def places(case: Case, generator: torch.Generator) -> Tensor:
    """A position a row, some at the end."""
    return torch.arange(case.sizes["rows"], dtype=torch.int32) * 2 % (case.sizes["steps"] + 1)


def case(rows: int, steps: int, elements: int, *, dtype: str = "float16") -> Case:
    """Sizes by name."""
    return Case(sizes={"rows": rows, "steps": steps, "elements": elements}, dtype=dtype)


SD15 = 4 * 320 + 4 * 640 + 12 * 1280 + 2 * 640  # out channels of 22 residual blocks

SPEC = KernelSpec(
    name="select_rows",
    kernel=select_rows,
    inputs=(
        TensorArgument(name="table", shape=("steps", "elements"), dtype="T"),
        TensorArgument(name="owner", shape=("elements",), dtype="int32"),
        TensorArgument(name="upcoming", shape=("rows",), dtype="int32"),
    ),
    scalars={name: name for name in ("rows", "steps", "elements")},
    outputs=(
        TensorArgument(name="out", shape=("elements",), dtype="T"),
        TensorArgument(name="position", shape=("rows",), dtype="int32"),
    ),
    config=config,
    grid=("cdiv(elements, BLOCK)",),
    bounds=("elements + BLOCK",),
    reference=reference,
    cases=(
        case(1, 1, 64),
        case(5, 4, 3000, dtype="bfloat16"),
        case(4, 9, 1024, dtype="float32"),
        case(2100, 3, 1100),  # more rows than a block has elements
    ),
    workloads={"sd15": case(1, 50, SD15), "sd15 by 8": case(8, 50, 8 * SD15)},
    tolerance=dict.fromkeys(("float16", "bfloat16", "float32"), 0.0),
    budget=Budget(registers=40, shared_bytes=4096),
    examples={"owner": owners, "upcoming": places},
)
