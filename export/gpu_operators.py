"""The operators `rt::…` as our Triton kernels, in a form that AOTInductor puts into a package.

https://docs.pytorch.org/tutorials/recipes/torch_compile_user_defined_triton_kernel_tutorial.html
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rt.export.operators import E4M3, ops
from rt.expression import evaluate
from rt.kernels.registry import spec
from rt.kernels.spec import Case, KernelSpec

OURS = ("attention",)
"""Operators that run our kernel; inductor compiles the others from their references and fuses them with what is around
them. A kernel belongs here when it was measured to be at least as fast: none is excluded by a measurement yet, and
GroupNorm and GEGLU are left to inductor because it can merge them with their neighbours."""


def gpu_operators() -> Mapping[Any, Callable[..., Tensor]]:
    """Operator to its kernel: ours for those in `OURS`, and cuBLAS for fp8."""
    return {
        ops.linear_fp8.default: linear_fp8,
        **{getattr(ops, name).default: _registered(name) for name in OURS},
    }


def linear_fp8(x: Tensor, weight: Tensor, bias: Tensor | None, x_scale: float, weight_scale: float) -> Tensor:
    """See `rt.export.operators`; the tensor cores multiply e4m3, and sum as fast as they can."""
    rows = (x.reshape(-1, x.shape[-1]).float() / x_scale).clamp(-E4M3, E4M3).to(weight.dtype)
    scales = [torch.full((), scale, device=x.device) for scale in (x_scale, weight_scale)]
    offset = None if bias is None else bias.to(x.dtype)
    y = torch._scaled_mm(rows, weight.t(), *scales, bias=offset, out_dtype=x.dtype, use_fast_accum=x.is_cuda)
    return y.reshape(*x.shape[:-1], -1)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """See `rt.export.operators`."""
    batch, queries, channels = query.shape
    sizes = {"batch": batch, "queries": queries, "keys": key.shape[1], "width": channels // heads}
    return _launch(spec("attention"), sizes, {"heads": heads}, [query, key, value])


def group_norm(x: Tensor, scale: Tensor, shift: Tensor, groups: int, epsilon: float, silu: bool) -> Tensor:
    """See `rt.export.operators`."""
    batch, channels = x.shape[0], x.shape[-1]
    pixels = x.reshape(batch, -1, channels)
    bias = torch.zeros(batch, channels, dtype=torch.float32, device=x.device)
    sizes = {"batch": batch, "pixels": pixels.shape[1], "channels": channels}
    attributes = {"groups": groups, "eps": epsilon, "silu": silu}
    return _launch(
        spec("group_norm"), sizes, attributes, [pixels, bias, scale.float(), shift.float()]
    ).reshape(x.shape)


def geglu(x: Tensor) -> Tensor:
    """See `rt.export.operators`."""
    rows = x.reshape(-1, x.shape[-1])
    sizes = {"rows": rows.shape[0], "features": rows.shape[1] // 2}
    return _launch(spec("geglu"), sizes, {}, [rows]).reshape(*x.shape[:-1], -1)


_LAUNCHES: Mapping[str, Callable[..., Tensor]] = {
    "attention": attention,
    "group_norm": group_norm,
    "geglu": geglu,
}


@cache
def _registered(name: str) -> Callable[..., Tensor]:
    launch = _LAUNCHES[name]
    registered: Callable[..., Tensor] = torch.library.triton_op(f"rt_gpu::{name}", launch, mutates_args={})
    return registered


def _launch(
    kernel: KernelSpec, sizes: Mapping[str, int], attributes: Mapping[str, Any], inputs: list[Tensor]
) -> Tensor:
    """The one output of `kernel`, which reads `inputs` as contiguous memory."""
    case = Case(sizes=sizes, dtype=str(inputs[0].dtype).removeprefix("torch."), attributes=attributes)
    [output] = kernel.outputs
    result = inputs[0].new_empty(kernel.extent(output, case))
    config = kernel.config(case)
    scalars = [int(evaluate(text, case.sizes)) for text in kernel.scalars.values()]
    run: Any = torch.library.wrap_triton(kernel.kernel)
    run[kernel.blocks(case)](
        *(tensor.contiguous() for tensor in inputs),
        *scalars,
        result,
        **kernel.constants(case),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return result
