"""The operators `rt::…` that a GPU runs as kernels of ours or of cuBLAS, in a form that AOTInductor can package.

https://docs.pytorch.org/tutorials/recipes/torch_compile_user_defined_triton_kernel_tutorial.html

Inductor compiles the others from their references: GroupNorm and GEGLU it can merge with their neighbours.
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
from rt.kernels.spec import Case


@cache
def gpu_operators() -> Mapping[Any, Callable[..., Tensor]]:
    """Operator to what computes it. That attention is faster so than inductor's own has not been measured."""
    registered: Callable[..., Tensor] = torch.library.triton_op(
        "rt_gpu::attention", attention, mutates_args={}
    )
    return {ops.linear_fp8.default: linear_fp8, ops.attention.default: registered}


def linear_fp8(x: Tensor, weight: Tensor, bias: Tensor | None, x_scale: float, weight_scale: float) -> Tensor:
    """See `rt.export.operators`; the tensor cores multiply e4m3, and sum as fast as they can."""
    rows = (x.reshape(-1, x.shape[-1]).float() / x_scale).clamp(-E4M3, E4M3).to(weight.dtype)
    first, second = (torch.full((), scale, device=x.device) for scale in (x_scale, weight_scale))
    offset = None if bias is None else bias.to(x.dtype)
    # cuBLAS adds it to a result in half precision alone.
    within = None if x.dtype is torch.float32 else offset
    y = torch._scaled_mm(
        rows, weight.t(), first, second, bias=within, out_dtype=x.dtype, use_fast_accum=x.is_cuda
    )
    if offset is not None and within is None:
        y = y + offset
    return y.reshape(*x.shape[:-1], -1)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """See `rt.export.operators`; our kernel, which reads contiguous memory."""
    batch, queries, channels = query.shape
    kernel = spec("attention")
    case = Case(
        sizes={"batch": batch, "queries": queries, "keys": key.shape[1], "width": channels // heads},
        dtype=str(query.dtype).removeprefix("torch."),
        attributes={"heads": heads},
    )
    [output] = kernel.outputs
    result = query.new_empty(kernel.extent(output, case))
    config = kernel.config(case)
    run: Any = torch.library.wrap_triton(kernel.kernel)
    run[kernel.blocks(case)](
        *(tensor.contiguous() for tensor in (query, key, value)),
        *(int(evaluate(text, case.sizes)) for text in kernel.scalars.values()),
        result,
        **kernel.constants(case),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return result
