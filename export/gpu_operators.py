"""The operators `rt::…` that a GPU runs as kernels of ours or of a library, in a form that AOTInductor can package.

https://docs.pytorch.org/tutorials/recipes/torch_compile_user_defined_triton_kernel_tutorial.html

Where several compute the same, `rt.export.candidates` says which is taken. Inductor compiles the others from their
references: GEGLU it can merge with its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import (
    create_tma_stable_metadata,
    kernel_side_table,
    triton_kernel_wrapper_mutation,
)

from rt.export.candidates import Choose
from rt.export.operators import E4M3, REFERENCES, WIDEST_HEAD, ops
from rt.expression import evaluate
from rt.kernels import group_normalize, group_statistics
from rt.kernels.registry import spec
from rt.kernels.spec import Case

Operator = Callable[..., Tensor]
OURS, TMA, LIBRARY, PRODUCTS, APART = "ours", "ours with TMA", "cudnn", "products", "apart"
"""Names of candidates: a kernel of ours, cuDNN's, products with what is between them, several operators."""
_HOPPER = (9, 0)
_ROWS_AT_ONCE = 4096
_ONE_LAUNCH = 256
"""Up to so many pixels a GroupNorm is one launch: there are too few groups to fill a GPU with longer ones."""
_WIDEST_LIBRARY = 128
"""Width of heads up to which cuDNN has a kernel."""


def gpu_operators(choose: Choose) -> Mapping[Any, Operator]:
    """Operator to what computes it, on tensors of a GPU or on fake ones."""
    return {
        ops.linear_fp8.default: linear_fp8,
        ops.group_norm.default: group_norm,
        **{operator: partial(_chosen, choose, operator) for operator in _CANDIDATES},
    }


def _chosen(choose: Choose, operator: Any, *arguments: Any) -> Tensor:
    candidates = _CANDIDATES[operator](*arguments)
    return candidates[choose(operator, arguments, candidates)](*arguments)


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: float,
    weight_scale: float,
    scales: Tensor | None = None,
) -> Tensor:
    """See `rt.export.operators`; the tensor cores multiply e4m3, and sum as fast as they can."""
    rows = (x.reshape(-1, x.shape[-1]).float() / x_scale).clamp(-E4M3, E4M3).to(weight.dtype)
    if scales is None:
        scales = torch.tensor([x_scale, weight_scale], device=x.device)
    first, second = scales[:1], scales[1:]
    offset = None if bias is None else bias.to(x.dtype)
    # cuBLAS adds it to a result in half precision alone.
    within = None if x.dtype is torch.float32 else offset
    y = torch._scaled_mm(
        rows, weight.t(), first, second, bias=within, out_dtype=x.dtype, use_fast_accum=x.is_cuda
    )
    if offset is not None and within is None:
        y = y + offset
    return y.reshape(*x.shape[:-1], -1)


def group_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    groups: int,
    epsilon: float,
    silu: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """See `rt.export.operators`; one launch where groups are short, else two."""
    if bias is None:
        bias = scale.new_zeros(1, x.shape[-1], dtype=torch.float32)
    kernel: Any = _registered("group_norm", _group_norm)
    result: Tensor = kernel(x, bias.float(), scale.float(), shift.float(), groups, epsilon, silu)
    return result


def _group_norm(
    x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, groups: int, epsilon: float, silu: bool
) -> Tensor:
    flat = x.contiguous().flatten(1, -2)
    batch, pixels, channels = flat.shape
    sizes = {"batch": batch, "pixels": pixels, "channels": channels}
    attributes = {"groups": groups, "eps": epsilon, "silu": silu}
    # Rows that share a bias read it with a stride of 0.
    strides = {"bias_stride": 0 if len(bias) < batch else channels}
    bias, scale, shift = bias.contiguous(), scale.contiguous(), shift.contiguous()
    if pixels <= _ONE_LAUNCH:
        case = _case(flat, sizes, attributes)
        [y] = _launch("group_norm", case, (flat, bias, scale, shift), strides)
    else:
        chunk = group_statistics.chunk_of(pixels)
        case = _case(flat, sizes, {"groups": groups, "chunk": chunk})
        statistics = _launch("group_statistics", case, (flat, bias), strides)
        case = group_normalize.case(
            batch, pixels, channels, chunk, groups=groups, eps=epsilon, silu=silu, dtype=case.dtype
        )
        [y] = _launch("group_normalize", case, (flat, bias, scale, shift, *statistics), strides)
    return y.view(x.shape)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """See `rt.export.operators`; our kernel, which reads contiguous memory."""
    sizes = {
        "batch": query.shape[0],
        "queries": query.shape[1],
        "keys": key.shape[1],
        "width": query.shape[2] // heads,
    }
    operands = tuple(tensor.contiguous() for tensor in (query, key, value))
    [y] = _launch("attention", _case(query, sizes, {"heads": heads}), operands)
    return y


def self_attention(qkv: Tensor, heads: int) -> Tensor:
    """See `rt.export.operators`; our kernel."""
    sizes = {"batch": qkv.shape[0], "tokens": qkv.shape[1], "width": qkv.shape[2] // 3 // heads}
    [y] = _launch("self_attention", _case(qkv, sizes, {"heads": heads}), (qkv.contiguous(),))
    return y


def library_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """cuDNN's, which reads and writes heads where they are."""
    q, k, v = (_apart(x, heads) for x in (query, key, value))
    y: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
    return y.transpose(1, 2).flatten(2)


def product_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Two products and a softmax, some rows at a time: of heads so wide that a tile of them fills a multiprocessor.

    Logits are in the format of the operands, which float16 has the digits for, and bfloat16 has not.

    At 1024 x 1024 pixels a decoder's matrix of weights has 16384 rows, half a gigabyte.
    """
    q, k, v = (_apart(x, heads) for x in (query, key, value))
    q = q * q.shape[-1] ** -0.5
    parts = [
        torch.softmax(rows @ k.mT, -1, dtype=torch.float32).to(v.dtype) @ v
        for rows in q.split(_ROWS_AT_ONCE, 2)
    ]
    return torch.cat(parts, 2).transpose(1, 2).flatten(2)


def _apart(x: Tensor, heads: int) -> Tensor:
    """(B, L, H · d) as (B, H, L, d), without a copy."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _attention_candidates(query: Tensor, key: Tensor, value: Tensor, heads: int) -> dict[str, Operator]:
    found: dict[str, Operator] = {OURS: _registered("attention", attention)}
    width = query.shape[-1] // heads
    if width > WIDEST_HEAD:
        products: dict[str, Operator] = {PRODUCTS: product_attention}
        return {**found, **products} if query.dtype is torch.bfloat16 else {**products, **found}
    if _has_library(query, width):
        found[LIBRARY] = library_attention
        if width >= 64:  # cuDNN pads narrower ones to as much
            return {LIBRARY: library_attention, **found}
    return found


def _self_attention_candidates(qkv: Tensor, heads: int) -> dict[str, Operator]:
    def in_three(operator: Operator) -> Operator:
        return lambda qkv, heads: operator(*qkv.chunk(3, -1), heads)

    query, key, value = qkv.chunk(3, -1)
    found = _attention_candidates(query, key, value, heads)
    return {
        name: _registered("self_attention", self_attention) if name == OURS else in_three(operator)
        for name, operator in found.items()
    }


def _has_library(x: Tensor, width: int) -> bool:
    """Whether cuDNN has attention in this format, on a GPU where it is worth asking."""
    fits = width % 8 == 0 and width <= _WIDEST_LIBRARY
    return _is_half(x) and fits and torch.cuda.get_device_capability() == _HOPPER


def query_attention(x: Tensor, weight: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """See `rt.export.operators`; our kernel."""
    sizes = {
        "batch": x.shape[0],
        "queries": x.shape[1],
        "keys": key.shape[1],
        "inner": x.shape[2],
        "width": weight.shape[0] // heads,
    }
    operands = tuple(tensor.contiguous() for tensor in (x, weight, key, value))
    [y] = _launch("query_attention", _case(x, sizes, {"heads": heads}), operands)
    return y


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `rt.export.operators`; our kernel."""
    rows = x.contiguous().flatten(0, -2)
    [y] = _launch("geglu_linear", _geglu_case(rows, weight), (rows, weight.contiguous(), bias.contiguous()))
    return y.view(*x.shape[:-1], -1)


def described_geglu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same by the tensor memory accelerator: an operator that takes descriptors is one of torch's own making."""
    rows = x.contiguous().flatten(0, -2)
    case = _geglu_case(rows, weight)
    kernel = spec("geglu_linear_tma")
    config, y = kernel.config(case), x.new_empty(len(rows), weight.shape[0] // 2)
    halves = weight.contiguous().view(2, -1, weight.shape[1])
    # Warps of a kernel that is called so are those of an autotuner's configuration.
    tuned = triton.autotune([triton.Config({}, num_warps=config.warps, num_stages=config.stages)], key=[])
    triton_kernel_wrapper_mutation(
        kernel_idx=kernel_side_table.add_kernel(tuned(kernel.kernel)),
        constant_args_idx=kernel_side_table.add_constant_args({"rows": len(rows), **kernel.constants(case)}),
        grid=[(*kernel.blocks(case), 1, 1)],
        tma_descriptor_metadata={
            name: create_tma_stable_metadata([*kernel.block(name, case)]) for name in kernel.descriptors
        },
        kwargs={"x": rows, "weight": halves, "bias": bias.contiguous(), "y": y},
    )
    return y.view(*x.shape[:-1], -1)


def _geglu_case(rows: Tensor, weight: Tensor) -> Case:
    sizes = {"rows": len(rows), "inner": weight.shape[1], "features": weight.shape[0] // 2}
    return _case(rows, sizes, {})


def _query_attention_candidates(
    x: Tensor, weight: Tensor, key: Tensor, value: Tensor, heads: int
) -> dict[str, Operator]:
    query = x.new_empty(*x.shape[:-1], weight.shape[0])
    attentions = _attention_candidates(query, key, value, heads)

    def apart(x: Tensor, weight: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        return next(iter(attentions.values()))(F.linear(x, weight), key, value, heads)

    fused = {OURS: _registered("query_attention", query_attention)} if _is_half(x) else {}
    return {APART: apart, **fused}


def _geglu_linear_candidates(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Operator]:
    found = {APART: REFERENCES[ops.geglu_linear.default]}
    if _is_half(x):
        found[OURS] = _registered("geglu_linear", geglu_linear)
        if torch.cuda.get_device_capability() == _HOPPER and weight.shape[1] % 8 == weight.shape[0] % 16 == 0:
            found[TMA] = _registered("geglu_linear_tma", described_geglu_linear)
    return found


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


_CANDIDATES: Mapping[Any, Callable[..., dict[str, Operator]]] = {
    ops.attention.default: _attention_candidates,
    ops.self_attention.default: _self_attention_candidates,
    ops.query_attention.default: _query_attention_candidates,
    ops.geglu_linear.default: _geglu_linear_candidates,
}
"""Operator to everything that can compute it, the likely fastest first."""


@cache
def _registered(name: str, body: Operator) -> Operator:
    """An operator whose kernels inductor packages."""
    found: Operator = torch.library.triton_op(f"rt_gpu::{name}", body, mutates_args={})
    return found


def _case(x: Tensor, sizes: Mapping[str, int], attributes: Mapping[str, Any]) -> Case:
    return Case(sizes=sizes, dtype=str(x.dtype).removeprefix("torch."), attributes=attributes)


def _launch(
    name: str, case: Case, inputs: tuple[Tensor, ...], scalars: Mapping[str, int] | None = None
) -> list[Tensor]:
    """Our kernel on contiguous tensors; `scalars` in place of what the spec says of them."""
    major, minor = torch.cuda.get_device_capability()
    kernel = spec(name).on(10 * major + minor)
    results = [
        inputs[0].new_empty(kernel.extent(output, case), dtype=getattr(torch, kernel.dtype(output, case)))
        for output in kernel.outputs
    ]
    config = kernel.config(case)
    values = {key: int(evaluate(text, case.sizes)) for key, text in kernel.scalars.items()}
    values |= scalars or {}
    run: Any = torch.library.wrap_triton(kernel.kernel)
    run[kernel.blocks(case)](
        *inputs,
        *values.values(),
        *results,
        **kernel.constants(case),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return results
