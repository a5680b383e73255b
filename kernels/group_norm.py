"""GroupNorm of channels-last pixels, with a bias before and SiLU after, in one launch.

    h = x + bias                                       x (batch, pixels, channels) in T, bias (batch, channels)
    y = (h − mean) / √(variance + eps) · scale + shift     over the pixels and channels / groups channels of a group
    y = y · sigmoid(y)                                 if silu

Everything but x and y is fp32; so are all sums. The bias is the time embedding of a residual block, which may hold the
bias of the convolution before it, too; a norm that has none is given zeros. A caller of the Triton function whose rows
share one bias has it read with a stride of 0.

A program owns one group of one row of the batch. It reads the group twice: statistics (`welford`), then the result; the
second time it comes from the L2 cache. `group_statistics` and `group_normalize` spread a group over many programs, for
pictures that have too few groups to fill a GPU.

Wu and He, "Group Normalization", https://arxiv.org/abs/1803.08494.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rt.kernel_image import TensorArgument
from rt.kernels.spec import Budget, Case, Config, KernelSpec
from rt.kernels.welford import accumulate, merge, seen


def reference(
    x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, *, groups: int, eps: float, silu: bool
) -> tuple[Tensor]:
    """In torch."""
    y = F.group_norm((x + bias[:, None]).movedim(-1, 1), groups, scale, shift, eps).movedim(1, -1)
    return (F.silu(y) if silu else y,)


@triton.jit
def group_norm(
    x,
    bias,
    scale,
    shift,
    pixels,
    bias_stride,
    y,
    channels: tl.constexpr,
    groups: tl.constexpr,
    eps: tl.constexpr,
    silu: tl.constexpr,
    BLOCK: tl.constexpr,  # pixels at a time
    WIDTH: tl.constexpr,  # the channels of a group, up to a power of two
):
    """In Triton: a program a group of a row."""
    width: tl.constexpr = channels // groups
    row = tl.program_id(0) // groups
    column = tl.arange(0, WIDTH)
    channel = tl.program_id(0) % groups * width + column
    inside = column < width
    added = tl.load(bias + row * bias_stride + channel, inside, 0.0)[None, :]

    pixel = tl.arange(0, BLOCK)
    start = row.to(tl.int64) * pixels * channels  # a picture may hold more than 2³¹ values
    offset = pixel[:, None] * channels + channel[None, :]
    mean = tl.zeros((BLOCK, WIDTH), tl.float32)
    m2 = tl.zeros((BLOCK, WIDTH), tl.float32)
    for first in range(0, pixels, BLOCK):
        valid = (first + pixel < pixels)[:, None] & inside[None, :]
        value = (
            tl.load(x + start + tl.cast(first, tl.int64) * channels + offset, valid, 0.0).to(tl.float32)
            + added
        )
        mean, m2 = accumulate(value, mean, m2, first // BLOCK + 1.0, valid)
    mean, m2 = merge(mean, m2, seen(pixels, pixel, BLOCK)[:, None], 0)
    mean, m2 = merge(mean, m2, tl.where(inside, pixels, 0).to(tl.float32), 0)

    factor = tl.load(scale + channel, inside, 0.0)[None, :] * tl.rsqrt(m2 / (pixels * width) + eps)
    term = tl.load(shift + channel, inside, 0.0)[None, :]
    for first in range(0, pixels, BLOCK):
        valid = (first + pixel < pixels)[:, None] & inside[None, :]
        at = start + tl.cast(first, tl.int64) * channels + offset
        value = (tl.load(x + at, valid, 0.0).to(tl.float32) + (added - mean)) * factor + term
        if silu:
            value *= tl.sigmoid(value)
        tl.store(y + at, value.to(y.dtype.element_ty), valid)


def config(case: Case) -> Config:
    """Eight values a thread; sixteen in long narrow groups, whose loads are of few bytes each."""
    width = triton.next_power_of_2(case.sizes["channels"] // int(case.attributes["groups"]))
    most = 8192 if width < 64 else 4096
    tile = max(256, min(most, triton.next_power_of_2(case.sizes["pixels"]) * width))
    return Config(constants={"BLOCK": tile // width, "WIDTH": width}, warps=min(16, tile // 256))


def off_centre(case: Case, generator: torch.Generator) -> Tensor:
    """Values whose mean is ten times their deviation, and other in each channel: E[x²] − E[x]² would show."""
    x = torch.randn(*(case.sizes[name] for name in ("batch", "pixels", "channels")), generator=generator)
    return x + 10 + torch.randn(case.sizes["channels"], generator=generator)


def case(
    batch: int,
    pixels: int,
    channels: int,
    *,
    groups: int = 32,
    eps: float = 1e-5,
    silu: bool = True,
    dtype: str = "float16",
) -> Case:
    """A norm of diffusers' blocks unless said otherwise."""
    return Case(
        sizes={"batch": batch, "pixels": pixels, "channels": channels},
        dtype=dtype,
        attributes={"groups": groups, "eps": eps, "silu": silu},
    )


def eager(
    x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, *, groups: int, eps: float, silu: bool
) -> Tensor:
    """What diffusers runs: three operators on channels-last tensors."""
    h = (x + bias.to(x.dtype)[:, None]).movedim(-1, 1)
    y = F.group_norm(h, groups, scale.to(x.dtype), shift.to(x.dtype), eps)
    return (F.silu(y) if silu else y).movedim(1, -1)


CHANNELS = {1: (320, 640, 960), 2: (640, 320, 960, 1280, 1920), 4: (1280, 640, 1920, 2560), 8: (1280, 2560)}
"""How often the latent's sides are divided, to the channels that meet a norm there in the U-Nets of SD and SDXL."""


def unet_norms(model: str, side: int, levels: Sequence[int], attention: Sequence[int]) -> dict[str, Case]:
    """The norms of a U-Net under guidance: those of residual blocks with SiLU, those before attention without.

    Args:
        model: Its name in the names of the cases.
        side: Of the latent.
        levels: What its sides are divided by.
        attention: The levels with attention, which has the level's first number of channels.
    """
    found = {}
    for level in levels:
        own = side // level
        for channels in CHANNELS[level]:
            found[f"{model} {own}x{own}x{channels}"] = case(2, own * own, channels)
        if level in attention:
            channels = CHANNELS[level][0]
            found[f"{model} {own}x{own}x{channels} plain"] = case(
                2, own * own, channels, eps=1e-6, silu=False
            )
    return found


SPEC = KernelSpec(
    name="group_norm",
    kernel=group_norm,
    inputs=(
        TensorArgument(name="x", shape=("batch", "pixels", "channels"), dtype="T"),
        TensorArgument(name="bias", shape=("batch", "channels"), dtype="float32"),
        TensorArgument(name="scale", shape=("channels",), dtype="float32"),
        TensorArgument(name="shift", shape=("channels",), dtype="float32"),
    ),
    scalars={"pixels": "pixels", "bias_stride": "channels"},
    outputs=(TensorArgument(name="y", shape=("batch", "pixels", "channels"), dtype="T"),),
    fixed=("channels",),
    config=config,
    grid=("batch * groups",),
    bounds=("pixels * (channels // groups)", "pixels + BLOCK"),
    reference=reference,
    cases=(
        case(1, 64, 320),
        case(2, 77, 640, dtype="bfloat16"),
        case(3, 100, 1280, silu=False, eps=1e-6),
        case(1, 49, 2560, dtype="bfloat16", eps=0.1),
        case(1, 1, 64, groups=2, eps=0.5),
        case(2, 1500, 20, groups=2),  # more pixels than a tile holds, and not a multiple
        case(1, 33, 12, groups=4, dtype="float32", silu=False),
    ),
    workloads={
        **unet_norms("sd15", 64, (1, 2, 4, 8), (1, 2, 4, 8)),
        **unet_norms("sd21", 96, (1, 2, 4, 8), (1, 2, 4, 8)),
        **unet_norms("sdxl", 128, (1, 2, 4), (2, 4)),
    },
    tolerance={"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5},
    budget=Budget(registers=102, shared_bytes=8192),
    examples={"x": off_centre},
    alternatives={"eager": eager},
)
