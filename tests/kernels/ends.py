"""What stands before and after the loop, in a process of its own like loop.py: noise, first input, pixels."""

from __future__ import annotations

import json
import sys

import numpy as np
import torch

from rt.images import postprocess
from rt.kernels import launch, registry
from rt.kernels.spec import Case
from rt.philox import CudaGenerator, key_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pixels(values: torch.Tensor) -> tuple[int, int]:
    """How many pixels of a picture (elements,) differ from `postprocess`, and its flag."""
    result = torch.zeros((1, len(values)), dtype=torch.uint8, device=DEVICE)
    broken = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    case = Case(sizes={"batch": 1, "elements": len(values)}, dtype=str(values.dtype).removeprefix("torch."))
    tensors = {"x": values[None].to(DEVICE), "pixels": result, "broken": broken}
    launch.run(registry.spec("to_pixels"), case, tensors)
    expected = postprocess(values.float().nan_to_num(0.0, 0.0, 0.0).numpy())
    return int((result[0].cpu().numpy() != expected).sum()), int(broken)


def fed(value: float, dtype: torch.dtype) -> list[int]:
    """`broken` of three rows at position 4, of which the second holds `value` and the third is left alone."""
    state = torch.zeros(3, 9, 600)
    state[1:, 0, 599] = value
    tensors = {
        "state": state.to(DEVICE),
        "position": torch.full((3,), 4, dtype=torch.int32, device=DEVICE),
        "scale": torch.tensor([1.0, 1.0, 0.0], device=DEVICE),
        "out": torch.zeros((3, 600), dtype=dtype, device=DEVICE),
        "broken": torch.zeros(3, dtype=torch.int32, device=DEVICE),
    }
    case = Case(sizes={"rows": 3, "elements": 600}, dtype=str(dtype).removeprefix("torch."))
    launch.run(registry.spec("feed"), case, tensors)
    found: list[int] = tensors["broken"].tolist()
    return found


def noise() -> float:
    """Largest difference from `CudaGenerator` in four draws of a GPU so small that threads draw twice."""
    seeds, draws, elements = (0, 2**63 + 5), 4, 1800
    key = torch.tensor([key_of(seed) for seed in seeds]).to(torch.uint32)
    tensors = {
        "key": key.to(DEVICE),
        "draw": torch.arange(draws, dtype=torch.int32).repeat(2, 1).to(DEVICE),
        "resident": torch.tensor([256], dtype=torch.int32, device=DEVICE),
        "noise": torch.zeros((2, draws, elements), device=DEVICE),
    }
    case = Case(sizes={"rows": 2, "draws": draws, "elements": elements}, dtype="float32")
    launch.run(registry.spec("philox"), case, tensors)
    gap = 0.0
    for row, seed in enumerate(seeds):
        generator = CudaGenerator(seed, processors=1, threads_per_processor=256)
        for draw in range(draws):
            z = tensors["noise"][row, draw].cpu().numpy()
            gap = max(gap, float(np.abs(z - generator.randn((elements,))).max()))
    return gap


def main() -> None:
    """Everything, on the GPU if there is one."""
    half = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    between = (torch.arange(255, dtype=torch.float64) + 0.5) / 127.5 - 1  # halfway between two pixels
    near = torch.cat(
        [between.float(), *(torch.nextafter(between.float(), torch.tensor(e)) for e in (-9.0, 9.0))]
    )
    results = {
        "pixels": {
            "all of float16": pixels(half[half.isfinite()]),
            "halfway in float32": pixels(near),
            "halfway in bfloat16": pixels(near.bfloat16()),
            **{
                str(value): pixels(torch.tensor([0.5] * 2000 + [value]))
                for value in (np.nan, np.inf, -np.inf)
            },
        },
        "fed": {
            "float16": {str(value): fed(value, torch.float16) for value in (np.nan, -np.inf, 7e4, 6e4)},
            "bfloat16": {"70000.0": fed(7e4, torch.bfloat16)},
        },
        "noise": noise(),
    }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
