"""Products in eight bits: linear layers and convolutions in int8, linear layers in fp8.

A product reads its operands through a dequantize node, the form that engines fuse into a kernel of eight bits ("QDQ" in
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). Everything else stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import onnxscript
import torch
from torch import Tensor, fx, nn

from rt.export.operators import ops
from rt.export.passes.shapes import attribute

aten = torch.ops.aten
onnx: Any = onnxscript.opset21  # its stubs do not know values that are being traced
_PRODUCTS = (aten.linear.default, aten.conv2d.default, ops.convolution.default)
_UINT8, _E4M3 = 2, 17  # of onnx.TensorProto
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Range:
    """The values that a tensor takes; zero is always one of them, so that padding is exact."""

    low: float
    high: float

    @classmethod
    def of(cls, tensor: Tensor) -> Range:
        """From the smallest to the largest element, and zero."""
        low, high = torch.aminmax(tensor)
        return cls(min(float(low), 0.0), max(float(high), 0.0))

    def __or__(self, other: Range) -> Range:
        return Range(min(self.low, other.low), max(self.high, other.high))

    @property
    def largest(self) -> float:
        """Absolute value."""
        return max(-self.low, self.high, 1e-30)

    @property
    def scale(self) -> float:
        """Of a step of uint8."""
        return max(self.high - self.low, 1e-30) / 255  # of a tensor that is zero, anything is right

    @property
    def zero(self) -> int:
        """Which uint8 stands for zero."""
        return round(-self.low / self.scale)


def products(module: fx.GraphModule, bits: Bits) -> dict[str, fx.Node]:
    """The nodes that `quantize` can rewrite, by the name of their weight, in the order of the graph."""
    found = {}
    for node in module.graph.nodes:
        weight = node.args[1] if node.target in _PRODUCTS else None
        if isinstance(weight, fx.Node) and weight.target is aten.reshape.default:
            weight = weight.args[0]  # a 1 × 1 convolution as a linear layer
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and bits.covers(attribute(weight)):
            found[str(weight.target)] = node
    return found


class Bits(Protocol):
    """A format of eight bits: which products have it, and how their operands get it."""

    def covers(self, weight: Tensor) -> bool:
        """Whether engines have kernels for a product with this weight."""

    def rounded(self, graph: fx.Graph, x: fx.Node, seen: Range) -> fx.Node:
        """`x` through the format and back."""

    def weight(self, attributes: dict[str, Tensor], graph: fx.Graph, stem: str, value: Tensor) -> fx.Node:
        """`value` in the format, kept in `attributes` under names that begin with `stem`, and read back."""


class _Int8:
    """Activations asymmetric uint8 with a scale a tensor, weights symmetric int8 with a scale an output channel."""

    def covers(self, weight: Tensor) -> bool:
        return True

    def rounded(self, graph: fx.Graph, x: fx.Node, seen: Range) -> fx.Node:
        return graph.call_function(ROUNDED, (x, seen.scale, seen.zero))

    def weight(self, attributes: dict[str, Tensor], graph: fx.Graph, stem: str, value: Tensor) -> fx.Node:
        names = (f"{stem}_int8", f"{stem}_scale")
        for name, part in zip(names, _quantized(value), strict=True):
            attributes[name] = nn.Parameter(part, requires_grad=False)
        return graph.call_function(DEQUANTIZED, tuple(map(graph.get_attr, names)))


class _Fp8:
    """Both e4m3 with a scale a tensor, https://arxiv.org/abs/2209.05433: what every GPU with fp8 multiplies."""

    def covers(self, weight: Tensor) -> bool:
        return weight.dim() == 2

    def rounded(self, graph: fx.Graph, x: fx.Node, seen: Range) -> fx.Node:
        return graph.call_function(ROUNDED_FP8, (x, seen.largest / _LARGEST))

    def weight(self, attributes: dict[str, Tensor], graph: fx.Graph, stem: str, value: Tensor) -> fx.Node:
        scale = max(float(value.detach().abs().max()), 1e-30) / _LARGEST
        part = (value.detach() / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        attributes[f"{stem}_fp8"] = nn.Parameter(part, requires_grad=False)
        return graph.call_function(DEQUANTIZED_FP8, (graph.get_attr(f"{stem}_fp8"), scale, torch.float32))


INT8: Bits = _Int8()
FP8: Bits = _Fp8()


def quantize(
    module: fx.GraphModule,
    ranges: Mapping[str, Range],
    chosen: Collection[str] | None = None,
    bits: Bits = INT8,
) -> fx.GraphModule:
    """`module` with those of its products in eight bits that `bits` covers.

    Args:
        module: A graph in fp32; it is not changed.
        ranges: Of the input of each product, by the name of its weight.
        chosen: The names of the weights to quantize; those of all ranges when None.
        bits: The format.
    """
    nodes = {
        node: name
        for name, node in products(module, bits).items()
        if name in (ranges if chosen is None else chosen)
    }
    attributes: dict[str, Tensor] = {n.target: attribute(n) for n in module.graph.nodes if n.op == "get_attr"}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    rounded: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node not in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            continue
        source, name, seen = node.args[0], nodes[node], ranges[nodes[node]]
        if source not in rounded:  # queries, keys and values read one
            rounded[source] = bits.rounded(graph, copies[source], seen)
        value, stem = attributes[name], name.replace(".", "_")
        if node.target is aten.linear.default:
            value = value.flatten(1)
        weight = bits.weight(attributes, graph, stem, value)
        rest = fx.map_arg(node.args[2:], copies.__getitem__)
        copies[node] = _product(graph, node, rounded[source], weight, rest)
    graph.eliminate_dead_code()
    read = {node.target for node in graph.nodes if node.op == "get_attr"}
    return fx.GraphModule({name: value for name, value in attributes.items() if name in read}, graph)


def _product(graph: fx.Graph, node: fx.Node, x: fx.Node, weight: fx.Node, rest: tuple[Any, ...]) -> fx.Node:
    """The product `node` of other operands; ours that is channels last as the one that engines have in int8."""
    if node.target is not ops.convolution.default:
        return graph.call_function(node.target, (x, weight, *rest), node.kwargs)  # type: ignore[arg-type]
    first = graph.call_function(aten.permute.default, (x, [0, 3, 1, 2]))
    product = graph.call_function(aten.conv2d.default, (first, weight, *rest, [1, 1], [1, 1]))
    return graph.call_function(aten.permute.default, (product, [0, 2, 3, 1]))


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (O, …) as int8 and its scale (O,)."""
    scale = weight.detach().abs().flatten(1).amax(dim=1).clamp(min=1e-30) / 127
    return torch.round(weight / _as_channels(scale, weight)).to(torch.int8), scale


def _as_channels(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (weight.dim() - 1))


@torch.library.custom_op("rt::rounded", mutates_args=())
def _round(x: Tensor, scale: float, zero: int) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


@_round.register_fake
def _(x: Tensor, scale: float, zero: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("rt::dequantized", mutates_args=())
def _dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    return weight * _as_channels(scale, weight)


@_dequantize.register_fake
def _(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=scale.dtype)


@torch.library.custom_op("rt::rounded_fp8", mutates_args=())
def _round_fp8(x: Tensor, scale: float) -> Tensor:
    return ((x / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).to(x.dtype)) * scale


@_round_fp8.register_fake
def _(x: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("rt::dequantized_fp8", mutates_args=())
def _dequantize_fp8(weight: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) * scale


@_dequantize_fp8.register_fake
def _(weight: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


ROUNDED, DEQUANTIZED = ops.rounded.default, ops.dequantized.default
"""What a product in int8 reads: its operands, rounded, in fp32."""
ROUNDED_FP8, DEQUANTIZED_FP8 = ops.rounded_fp8.default, ops.dequantized_fp8.default
"""What a product in fp8 reads: its operands, rounded, in the format that the rest of the graph computes in."""


def _onnx_rounded(x: Any, scale: float, zero: int) -> Any:
    step, offset = onnx.Constant(value_float=scale), onnx.Cast(onnx.Constant(value_int=zero), to=_UINT8)
    return onnx.DequantizeLinear(onnx.QuantizeLinear(x, step, offset), step, offset)


def _onnx_dequantized(weight: Any, scale: Any) -> Any:
    return onnx.DequantizeLinear(weight, scale, axis=0)


def _onnx_rounded_fp8(x: Any, scale: float) -> Any:
    step = onnx.CastLike(onnx.Constant(value_float=scale), x)
    zero = onnx.Cast(onnx.Constant(value_float=0.0), to=_E4M3)
    return onnx.DequantizeLinear(onnx.QuantizeLinear(x, step, zero), step, zero)


def _onnx_dequantized_fp8(weight: Any, scale: float, dtype: int) -> Any:
    return onnx.DequantizeLinear(weight, onnx.Cast(onnx.Constant(value_float=scale), to=dtype))


IN_ONNX: dict[Callable[..., Any], Callable[..., Any]] = {
    ROUNDED: _onnx_rounded,
    DEQUANTIZED: _onnx_dequantized,
    ROUNDED_FP8: _onnx_rounded_fp8,
    DEQUANTIZED_FP8: _onnx_dequantized_fp8,
}
"""What the exporter makes of these operators."""
