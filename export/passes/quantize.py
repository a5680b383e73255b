"""Linear layers and convolutions in int8.

Weights are symmetric int8 with a scale an output channel, activations asymmetric uint8 with a scale a tensor. A product
reads both through a dequantize node, the form that engines fuse into an int8 kernel ("QDQ" in
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). Everything else stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import onnxscript
import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten
onnx: Any = onnxscript.opset21  # its stubs do not know values that are being traced
PRODUCTS = (aten.linear.default, aten.conv2d.default)
_UINT8 = 2  # onnx.TensorProto.UINT8


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
    def scale(self) -> float:
        """Of a step of uint8."""
        return max(self.high - self.low, 1e-30) / 255  # of a tensor that is zero, anything is right

    @property
    def zero(self) -> int:
        """Which uint8 stands for zero."""
        return round(-self.low / self.scale)


def products(module: fx.GraphModule) -> dict[str, fx.Node]:
    """The nodes that `quantize` can rewrite, by the name of their weight, in the order of the graph."""
    return {
        str(node.args[1].target): node
        for node in module.graph.nodes
        if node.target in PRODUCTS and isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr"
    }


def quantize(
    module: fx.GraphModule, ranges: Mapping[str, Range], chosen: Collection[str] | None = None
) -> fx.GraphModule:
    """`module` with its products in int8.

    Args:
        module: A graph in fp32; it is not changed.
        ranges: Of the input of each product, by the name of its weight.
        chosen: The names of the weights to quantize; those of all ranges when None.
    """
    nodes = {
        node: name
        for name, node in products(module).items()
        if name in (ranges if chosen is None else chosen)
    }
    attributes = {n.target: _attribute(module, n.target) for n in module.graph.nodes if n.op == "get_attr"}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    rounded: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node not in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            continue
        source, name, seen = node.args[0], nodes[node], ranges[nodes[node]]
        if source not in rounded:  # queries, keys and values read one
            rounded[source] = graph.call_function(_rounded, (copies[source], seen.scale, seen.zero))
        stem = name.replace(".", "_")
        for kind, value in zip(("int8", "scale"), _quantized(attributes[name]), strict=True):
            attributes[f"{stem}_{kind}"] = nn.Parameter(value, requires_grad=False)
        weight = graph.call_function(
            _dequantized, (graph.get_attr(f"{stem}_int8"), graph.get_attr(f"{stem}_scale"))
        )
        bias = fx.map_arg(node.args[2:], copies.__getitem__)
        copies[node] = graph.call_function(node.target, (rounded[source], weight, *bias), node.kwargs)
    graph.eliminate_dead_code()
    read = {node.target for node in graph.nodes if node.op == "get_attr"}
    return fx.GraphModule({name: value for name, value in attributes.items() if name in read}, graph)


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


_rounded, _dequantized = torch.ops.rt.rounded.default, torch.ops.rt.dequantized.default


def _onnx_rounded(x: Any, scale: float, zero: int) -> Any:
    step, offset = onnx.Constant(value_float=scale), onnx.Cast(onnx.Constant(value_int=zero), to=_UINT8)
    return onnx.DequantizeLinear(onnx.QuantizeLinear(x, step, offset), step, offset)


def _onnx_dequantized(weight: Any, scale: Any) -> Any:
    return onnx.DequantizeLinear(weight, scale, axis=0)


IN_ONNX: dict[Callable[..., Any], Callable[..., Any]] = {
    _rounded: _onnx_rounded,
    _dequantized: _onnx_dequantized,
}
"""What the exporter makes of the two operators."""


def _attribute(module: Any, target: str) -> Any:
    return reduce(getattr, target.split("."), module)
