"""What the machine can do at best: bandwidth, products, and what a launch costs. Everything else is held against it.

Copies count bytes read and bytes written. Products are of square matrices of normal numbers: zeros run faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rt.bench.gpu_parts.part import Context, Figures
from rt.bench.gpu_parts.place import Place, find

ROUNDS = 9
_LAUNCHES = 1000


def run(context: Context) -> Iterator[Figures]:
    """See the module. `copy_tb_s`, `tflops` by format, `launch_us` and `replay_us`."""
    place = find(context)
    figures: dict[str, object] = {"copy_tb_s": _copy(place)}
    yield figures
    figures["tflops"] = _products(place, context.seed)
    yield figures
    yield {**figures, **_launches(place)}


def _copy(place: Place) -> float:
    """TB/s of a copy within the device, of 4 GiB."""
    count = 2**20 if place.dry else 2**32
    source = torch.randint(255, (count,), dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    seconds = place.compare({"copy": lambda: target.copy_(source)}, ROUNDS)["copy"].median
    return 2 * count / seconds / 1e12


def _products(place: Place, seed: int) -> dict[str, float]:
    """TFLOP/s by format, those that this GPU has, called in turn."""
    size = 64 if place.dry else 8192
    generator = place.generator(seed)
    a, b = (torch.randn(size, size, generator=generator, device=place.device) for _ in range(2))
    calls = {"float16": _product(a, b, torch.float16), "bfloat16": _product(a, b, torch.bfloat16)}
    if not place.dry and torch.cuda.get_device_capability() >= (8, 9):
        calls["float8_e4m3fn"] = _fp8_product(a, b)
    return {name: 2 * size**3 / s.median / 1e12 for name, s in place.compare(calls, ROUNDS).items()}


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    left, right = a.to(dtype), b.to(dtype)
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out)


def _fp8_product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """One scale a tensor; sums stay in the tensor cores' own format, which is the fast one."""
    left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(
        left, right, scale_a=one, scale_b=one, out_dtype=torch.float16, use_fast_accum=True
    )


def _launches(place: Place) -> dict[str, float]:
    """Microseconds a kernel that does nothing much: launched one by one, and as nodes of a graph."""
    count = 2 if place.dry else _LAUNCHES
    value = torch.zeros(1, device=place.device)

    def launch() -> None:
        for _ in range(count):
            value.add_(1)

    samples = place.compare({"launch": launch, "replay": place.graph(launch)}, ROUNDS)
    return {f"{name}_us": each.median / count * 1e6 for name, each in samples.items()}
