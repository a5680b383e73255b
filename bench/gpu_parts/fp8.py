"""What an fp8 option could gain: the linear layers that take most of a step, in fp16 and in fp8 on the same values.

Weights are cast once, with a scale a tensor; activations are cast in each call, with a scale that was measured before.
The cast is also timed inside, because it has to be paid unless the operator before it writes fp8. The error is the
relative L2 distance from the product in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rt.bench.gpu_parts.part import Context, Figures
from rt.bench.gpu_parts.place import Call, Place, find, relative_error

# Rows, inner, features of the guided step at the model's own size.
LAYERS = {
    "sd15 GEGLU in 4096x320": (2 * 4096, 320, 2560),
    "sd15 GEGLU in 1024x640": (2 * 1024, 640, 5120),
    "sd15 GEGLU in 256x1280": (2 * 256, 1280, 10240),
    "sdxl query 1024x1280": (2 * 1024, 1280, 1280),
    "sdxl GEGLU in 4096x640": (2 * 4096, 640, 5120),
    "sdxl GEGLU in 1024x1280": (2 * 1024, 1280, 10240),
    "sdxl GEGLU out 1024x1280": (2 * 1024, 5120, 1280),
}
_FP8 = torch.float8_e4m3fn
_ROUNDS = 7


def run(context: Context) -> Iterator[Figures]:
    """See the module. `layers`."""
    place = find(context)
    rows: list[dict[str, Any]] = []
    for name, shape in LAYERS.items():
        rows.append({"layer": name, **_layer(place, (32, 32, 64) if context.dry else shape, context.seed)})
        yield {"layers": rows}
        if context.dry:
            return


def _layer(place: Place, shape: tuple[int, int, int], seed: int) -> dict[str, Any]:
    rows, inner, features = shape
    generator = place.generator(seed)
    x = torch.randn(rows, inner, generator=generator, device=place.device)
    weight = torch.randn(features, inner, generator=generator, device=place.device) / inner**0.5
    half = torch.float16
    x16, weight16 = x.to(half), weight.to(half)
    scale_x, scale_weight = _scale(x), _scale(weight)
    x8, weight8 = _cast(x16, scale_x), _cast(weight, scale_weight).t()

    def product(left: Tensor) -> Tensor:
        return torch._scaled_mm(left, weight8, scale_a=scale_x, scale_b=scale_weight, out_dtype=half)

    calls: dict[str, Call] = {
        "fp16": lambda: F.linear(x16, weight16),
        "fp8": lambda: product(x8),
        "fp8 with cast": lambda: product(_cast(x16, scale_x)),
    }
    exact = F.linear(x, weight)
    return {
        "shape": list(shape),
        "flops": 2 * rows * inner * features,
        "errors": {name: relative_error(call(), exact) for name, call in calls.items()},
        "times": {
            name: samples.to_json()
            for name, samples in place.compare(
                {name: place.graph(call) for name, call in calls.items()}, _ROUNDS
            ).items()
        },
    }


def _scale(value: Tensor) -> Tensor:
    """So that the largest value is the largest of the format."""
    return value.abs().max() / torch.finfo(_FP8).max


def _cast(value: Tensor, scale: Tensor) -> Tensor:
    return (value / scale.to(value.dtype)).to(_FP8)
