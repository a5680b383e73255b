"""torch's CUDA `randn`, for many rows and draws at once.

    noise[row, slot] = the draw[row, slot]-th torch.randn of the generator with the seed key[row]

    key (rows, 2) uint32, low word first, draw (rows, draws), from 0 → noise (rows, draws, elements)

A slot whose draw is negative is left alone. Thread t of torch's kernel takes counters (call, 0, t, 0), and its k-th
normal is element t + k · threads; there are as many threads as elements, in blocks of 256, up to the `resident` ones
that the GPU holds at once (`rt.philox`). The latents of a picture have fewer elements, so one normal of four is used.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011; torch's layout: its DistributionTemplates.h.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from rt.kernel_image import TensorArgument
from rt.kernels.spec import Budget, Case, Config, KernelSpec

UNIT, TURN = tl.constexpr(2.0**-32), tl.constexpr(2.0**-32 * 2 * math.pi)
WORD = 2**32


def _words(counter: list[Tensor], key: Tensor) -> list[Tensor]:
    """Philox4x32-10 in 64-bit integers: four counters (…) and a key (2,) to four words (…)."""

    def high(a: int, b: Tensor) -> Tensor:
        return a * (b >> 16) + (a * (b & 0xFFFF) >> 16) >> 16

    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        c0, c1, c2, c3 = (
            high(0xCD9E8D57, c2) ^ c1 ^ k0,
            (0xCD9E8D57 * c2) & 0xFFFFFFFF,
            high(0xD2511F53, c0) ^ c3 ^ k1,
            (0xD2511F53 * c0) & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return [c0, c1, c2, c3]


def reference(key: Tensor, draw: Tensor, resident: Tensor, noise: Tensor) -> tuple[Tensor]:
    """In torch, with Box-Muller in fp64."""
    elements = noise.shape[2]
    threads = min(int(resident), 256 * triton.cdiv(elements, 256))
    calls = triton.cdiv(elements, 4 * threads)
    noise = noise.clone()
    for row, slot in (draw >= 0).nonzero().tolist():
        counters = (torch.arange(count, device=key.device) for count in (calls, threads))
        call, thread = torch.meshgrid(*counters, indexing="ij")
        zero = torch.zeros_like(call)
        words = _words([int(draw[row, slot]) * calls + call, zero, thread, zero], key[row].long())
        normals = []
        for first, second in (words[:2], words[2:]):
            radius = torch.sqrt(-2 * torch.log((first + 0.5).double() / WORD))
            angle = (second + 0.5).double() * (2 * math.pi / WORD)
            normals += [radius * torch.sin(angle), radius * torch.cos(angle)]
        noise[row, slot] = torch.stack(normals, 1).reshape(-1)[:elements].float()
    return (noise,)


@triton.jit
def _normals(first, second):
    """Box-Muller as in curand_normal.h: the sine comes first."""
    radius = tl.sqrt(-2.0 * tl.log(first.to(tl.float32) * UNIT + UNIT / 2))
    angle = second.to(tl.float32) * TURN + TURN / 2
    return radius * tl.sin(angle), radius * tl.cos(angle)


@triton.jit
def philox(key, draw, resident, draws, elements, noise, BLOCK: tl.constexpr):
    """In Triton: a program for `BLOCK` counters of a slot; there are never more than elements, up to a block."""
    slot = tl.program_id(1)
    row = slot // draws
    number = tl.load(draw + slot)
    if number >= 0:
        threads = tl.minimum(tl.load(resident), tl.cdiv(elements, 256) * 256)
        calls = tl.cdiv(elements, 4 * threads)
        counter = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        call, thread = counter // threads, counter % threads
        zero = (counter * 0).to(tl.uint32)
        w0, w1, w2, w3 = philox_impl(
            (number * calls + call).to(tl.uint32),
            zero,
            thread.to(tl.uint32),
            zero,
            tl.load(key + 2 * row),
            tl.load(key + 2 * row + 1),
        )
        z0, z1 = _normals(w0, w1)
        out = noise + slot.to(tl.int64) * elements
        at = 4 * call * threads + thread
        # Beyond the last call `at` is beyond the end, too.
        tl.store(out + at, z0, at < elements)
        tl.store(out + at + threads, z1, at < elements - threads)
        if elements > 2 * threads:
            z2, z3 = _normals(w2, w3)
            tl.store(out + at + 2 * threads, z2, at < elements - 2 * threads)
            tl.store(out + at + 3 * threads, z3, at < elements - 3 * threads)


def config(case: Case) -> Config:
    """Two counters a thread."""
    return Config(constants={"BLOCK": 256}, warps=4)


def keys(case: Case, generator: torch.Generator) -> Tensor:
    """Any seeds."""
    return torch.randint(WORD, (case.sizes["rows"], 2), generator=generator)


def numbers(case: Case, generator: torch.Generator) -> Tensor:
    """Any draws, about half of them none."""
    shape = case.sizes["rows"], case.sizes["draws"]
    return torch.randint(-3, 4, shape, generator=generator, dtype=torch.int32)


def small_gpu(case: Case, generator: torch.Generator) -> Tensor:
    """A GPU small enough to need several calls a thread."""
    return torch.tensor([512], dtype=torch.int32)


def case(rows: int, draws: int, elements: int) -> Case:
    """Sizes by name."""
    return Case(sizes={"rows": rows, "draws": draws, "elements": elements}, dtype="float32")


SPEC = KernelSpec(
    name="philox",
    kernel=philox,
    inputs=(
        TensorArgument(name="key", shape=("rows", "2"), dtype="uint32"),
        TensorArgument(name="draw", shape=("rows", "draws"), dtype="int32"),
        TensorArgument(name="resident", shape=("1",), dtype="int32"),
    ),
    scalars={"draws": "draws", "elements": "elements"},
    outputs=(TensorArgument(name="noise", shape=("rows", "draws", "elements"), dtype="float32"),),
    inplace=frozenset({"noise"}),
    config=config,
    grid=("cdiv(elements, BLOCK)", "rows * draws"),
    reference=reference,
    cases=(case(2, 3, 100), case(1, 2, 512), case(3, 2, 1500), case(1, 3, 5000)),
    workloads={"sd15 512": case(1, 50, 4 * 64 * 64), "sdxl 1024": case(1, 50, 4 * 128 * 128)},
    tolerance={"float32": 1e-5},
    budget=Budget(registers=48, shared_bytes=0),
    examples={"key": keys, "draw": numbers, "resident": small_gpu},
)
