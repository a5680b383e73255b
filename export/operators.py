"""The fused operators `rt::…` that native kernels replace: for torch with their reference, for ONNX as functions.

Tensors are channels last; the result has the format of the first argument. Kernels sum, and compute whatever is not a
product, in fp32; so does the function of GroupNorm, while those of attention and GEGLU follow their inputs.
`kernels/native/kernels.h` has the same operators for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import onnx
import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnxscript import opset21
from onnxscript.values import Opset
from torch import Tensor

from rt.export.passes.cost import FLOPS
from rt.export.passes.shapes import value

DOMAIN, VERSION = "rt", 1
E4M3 = torch.finfo(torch.float8_e4m3fn).max
WIDEST_HEAD = 256
"""Width of heads up to which attention on a GPU keeps its sums in registers, and its logits in fp32."""


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √d) v: (B, L, H · d), (B, S, H · d), (B, S, H · d) → (B, L, H · d)."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def self_attention(qkv: Tensor, heads: int) -> Tensor:
    """Attention of the thirds of (B, L, 3 · H · d) along the last axis → (B, L, H · d)."""
    query, key, value = qkv.chunk(3, -1)
    return attention(query, key, value, heads)


def query_attention(x: Tensor, weight: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention whose queries are x Wᵀ: (B, L, C), (H · d, C), (B, S, H · d), (B, S, H · d) → (B, L, H · d)."""
    return attention(F.linear(x, weight), key, value, heads)


def group_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    groups: int,
    epsilon: float,
    silu: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """(B, …, C), normalised over the pixels and the C / groups channels of each group, then SiLU if asked for.

    `bias` (B or 1, C) is added to each pixel before; only what is compiled for a GPU has one.
    """
    h = x.movedim(-1, 1).float()
    if bias is not None:
        h = h + bias.float().reshape(*bias.shape, *[1] * (h.dim() - 2))
    y = F.group_norm(h, groups, scale.float(), shift.float(), epsilon).movedim(1, -1)
    return (F.silu(y) if silu else y).to(x.dtype).contiguous()


def geglu(x: Tensor) -> Tensor:
    """(…, 2F) → (…, F): the first half times the GELU of the second, https://arxiv.org/abs/2002.05202."""
    hidden, gate = x.float().chunk(2, -1)
    return (hidden * F.gelu(gate)).to(x.dtype)


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GEGLU of a linear layer: (…, I) by (2F, I) → (…, F)."""
    return geglu(F.linear(x, weight, bias))


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3 × 3, stride 1, zeros around: (B, H, W, I) by (O, I, 3, 3) → (B, H, W, O)."""
    offset = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), offset, padding=1)
    return y.permute(0, 2, 3, 1).contiguous()


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: float,
    weight_scale: float,
    scales: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + b with operands in e4m3: (…, I) by (O, I) → (…, O).

    `weight` is in e4m3 and stands for `weight_scale` times itself; x is divided by `x_scale`, saturated and rounded.
    `scales` (2,) are both once more, where a library wants them in memory.
    """
    rounded = (x.float() / x_scale).clamp(-E4M3, E4M3).to(weight.dtype).float() * x_scale
    y = F.linear(rounded, weight.float() * weight_scale, None if bias is None else bias.float())
    return y.to(x.dtype)


_REFERENCES = (
    attention,
    self_attention,
    query_attention,
    group_norm,
    geglu,
    geglu_linear,
    convolution,
    linear_fp8,
)
_OPERATORS = {
    body.__name__: torch.library.custom_op(f"rt::{body.__name__}", body, mutates_args=())
    for body in _REFERENCES
}


@_OPERATORS["attention"].register_fake
def _(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    return torch.empty_like(query)


@_OPERATORS["self_attention"].register_fake
def _(qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))


@_OPERATORS["query_attention"].register_fake
def _(x: Tensor, weight: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_OPERATORS["geglu_linear"].register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


@_OPERATORS["group_norm"].register_fake
def _(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    groups: int,
    epsilon: float,
    silu: bool,
    bias: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(x)


@_OPERATORS["geglu"].register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@_OPERATORS["convolution"].register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_OPERATORS["linear_fp8"].register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: float,
    weight_scale: float,
    scales: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


ops = torch.ops.rt
REFERENCES: dict[Any, Callable[..., Tensor]] = {
    getattr(ops, body.__name__).default: body for body in _REFERENCES
}
"""Each operator's body in standard ones."""
HALVES: dict[Any, int] = {
    ops.attention.default: 3,
    ops.self_attention.default: 1,
    ops.query_attention.default: 4,
    ops.group_norm.default: 1,
    ops.geglu.default: 1,
    ops.geglu_linear.default: 3,
    ops.convolution.default: 2,
    ops.linear_fp8.default: 1,
}
"""How many leading arguments a kernel takes in half precision; the rest stay in fp32."""


def _attention_flops(node: torch.fx.Node) -> int:
    query, key, *_ = cast(tuple[torch.fx.Node, ...], node.args)
    return int(4 * value(query).numel() * value(key).shape[1])


def _self_attention_flops(node: torch.fx.Node) -> int:
    return int(4 * value(node).numel() * value(node).shape[1])


def _query_attention_flops(node: torch.fx.Node) -> int:
    _, weight, key, *_ = cast(tuple[torch.fx.Node, ...], node.args)
    return int(2 * value(node).numel() * (value(weight).shape[1] + 2 * value(key).shape[1]))


def _geglu_linear_flops(node: torch.fx.Node) -> int:
    return int(4 * value(node).numel() * value(node.all_input_nodes[1]).shape[1])


def _convolution_flops(node: torch.fx.Node) -> int:
    return int(2 * value(node).numel() * value(node.all_input_nodes[1])[0].numel())


FLOPS[ops.attention.default] = _attention_flops
FLOPS[ops.self_attention.default] = _self_attention_flops
FLOPS[ops.query_attention.default] = _query_attention_flops
FLOPS[ops.geglu_linear.default] = _geglu_linear_flops
FLOPS[ops.convolution.default] = _convolution_flops

_BODIES = (
    """
<domain: "rt", opset_import: ["" : 21]>
Attention <heads> (Q, K, V) => (Y) {
  heads_0 = Constant <value_int: int = @heads> ()
  axis = Constant <value_ints = [0]> ()
  heads_1 = Unsqueeze (heads_0, axis)
  keep = Constant <value_ints = [0, 0]> ()
  rest = Constant <value_ints = [-1]> ()
  split = Concat <axis = 0> (keep, heads_1, rest)
  join = Concat <axis = 0> (keep, rest)
  q_0 = Reshape (Q, split)
  k_0 = Reshape (K, split)
  v_0 = Reshape (V, split)
  q = Transpose <perm = [0, 2, 1, 3]> (q_0)
  k = Transpose <perm = [0, 2, 3, 1]> (k_0)
  v = Transpose <perm = [0, 2, 1, 3]> (v_0)
  shape = Shape <start = 3> (q)
  width = CastLike (shape, Q)
  root = Sqrt (width)
  product = MatMul (q, k)
  logits = Div (product, root)
  weights = Softmax <axis = -1> (logits)
  sum = MatMul (weights, v)
  y = Transpose <perm = [0, 2, 1, 3]> (sum)
  Y = Reshape (y, join)
}
""",
    """
<domain: "rt", opset_import: ["" : 21]>
GroupNorm <groups, epsilon, silu> (X, Scale, Shift) => (Y) {
  shape = Shape (X)
  zero = Constant <value_ints = [0]> ()
  ends = Constant <value_ints = [0, -1]> ()
  groups_0 = Constant <value_int: int = @groups> ()
  groups_1 = Unsqueeze (groups_0, zero)
  batch = Shape <start = 0, end = 1> (X)
  rest = Constant <value_ints = [-1]> ()
  channels = Shape <start = -1> (X)
  size = Div (channels, groups_1)
  pixels = Concat <axis = 0> (batch, rest, groups_1, size)
  x_0 = Cast <to = 1> (X)
  x = Reshape (x_0, pixels)
  axes = Constant <value_ints = [1, 3]> ()
  mean = ReduceMean (x, axes)
  centered = Sub (x, mean)
  squares = Mul (centered, centered)
  variance = ReduceMean (squares, axes)
  epsilon_0 = Constant <value_float: float = @epsilon> ()
  shifted = Add (variance, epsilon_0)
  deviation = Sqrt (shifted)
  normal_0 = Div (centered, deviation)
  normal = Reshape (normal_0, shape)
  scale = Cast <to = 1> (Scale)
  shift = Cast <to = 1> (Shift)
  scaled = Mul (normal, scale)
  y = Add (scaled, shift)
  gate_0 = Sigmoid (y)
  silu_0 = Constant <value_int: int = @silu> ()
  asked = Cast <to = 9> (silu_0)
  one = Constant <value_float = 1.0> ()
  gate = Where (asked, gate_0, one)
  result = Mul (y, gate)
  Y = CastLike (result, X)
}
""",
    """
<domain: "rt", opset_import: ["" : 21]>
Geglu (X) => (Y) {
  hidden, gate = Split <axis = -1, num_outputs = 2> (X)
  active = Gelu (gate)
  Y = Mul (hidden, active)
}
""",
    """
<domain: "rt", opset_import: ["" : 21]>
Convolution (X, W, B) => (Y) {
  bias = CastLike (B, X)
  x = Transpose <perm = [0, 3, 1, 2]> (X)
  y = Conv <pads = [1, 1, 1, 1]> (x, W, bias)
  Y = Transpose <perm = [0, 2, 3, 1]> (y)
}
""",
)


def functions() -> list[ir.Function]:
    """Each operator as an ONNX function of standard operators, which any engine can run in its place."""
    return [ir.serde.deserialize_function(onnx.parser.parse_function(body)) for body in _BODIES]


def translations() -> dict[Any, Any]:
    """For `torch.onnx.export`: each operator as one node of the domain `rt`."""
    _register_schemas()
    rt = Opset(DOMAIN, VERSION)

    def to_attention(query, key, value, heads: int):  # type: ignore[no-untyped-def]
        return rt.Attention(query, key, value, heads=heads)

    def to_group_norm(x, scale, shift, groups: int, epsilon: float, silu: bool, bias=None):  # type: ignore[no-untyped-def]
        assert bias is None, "no graph in ONNX has one"
        return rt.GroupNorm(x, scale, shift, groups=groups, epsilon=epsilon, silu=int(silu))

    def to_geglu(x):  # type: ignore[no-untyped-def]
        return rt.Geglu(x)

    def to_convolution(x, weight, bias):  # type: ignore[no-untyped-def]
        if bias is None:  # kernels want one
            bias = opset21.Constant(value_floats=[0.0] * weight.shape[0])
        return rt.Convolution(x, weight, bias)

    return {
        ops.attention.default: to_attention,
        ops.group_norm.default: to_group_norm,
        ops.geglu.default: to_geglu,
        ops.convolution.default: to_convolution,
    }


def _register_schemas() -> None:
    """The exporter writes no node without one. Types are left open: weights may be wider than activations."""
    kinds = {int: onnx.defs.OpSchema.AttrType.INT, float: onnx.defs.OpSchema.AttrType.FLOAT}
    tensors = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    for name, inputs, attributes in (
        ("Attention", "QKV", {"heads": int}),
        ("GroupNorm", ("X", "Scale", "Shift"), {"groups": int, "epsilon": float, "silu": int}),
        ("Geglu", "X", {}),
        ("Convolution", "XWB", {}),
    ):
        if onnx.defs.has(name, domain=DOMAIN):
            continue
        parameter = onnx.defs.OpSchema.FormalParameter
        schema = onnx.defs.OpSchema(
            name,
            DOMAIN,
            VERSION,
            inputs=[parameter(each, "T" if i == 0 else f"T{i}") for i, each in enumerate(inputs)],
            outputs=[parameter("Y", "T")],
            type_constraints=[("T" if i == 0 else f"T{i}", tensors, "") for i in range(len(inputs))],
            attributes=[
                onnx.defs.OpSchema.Attribute(key, kinds[kind], "", required=True)
                for key, kind in attributes.items()
            ],
        )
        onnx.defs.register_schema(schema)
