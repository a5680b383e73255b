"""Products in eight bits: linear layers and convolutions in int8, linear layers in fp8. All else stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import onnxscript
import torch
from torch import Tensor, fx, nn

from rt.export.operators import E4M3, ops
from rt.export.passes.shapes import attribute

aten = torch.ops.aten
onnx: Any = onnxscript.opset21  # its stubs do not know values that are being traced
_PRODUCTS = (aten.linear.default, aten.conv2d.default, ops.convolution.default)
_UINT8, _E4M3 = 2, 17  # of onnx.TensorProto


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Rewrite:
    """A graph on its way to eight bits.

    Attributes:
        graph: The new one.
        attributes: Its weights, by name.
        copies: Old node to new.
        rounded: Old node to its value in eight bits: queries, keys and values read one.
    """

    graph: fx.Graph
    attributes: dict[str, Tensor]
    copies: dict[fx.Node, fx.Node]
    rounded: dict[fx.Node, fx.Node]

    def parameter(self, name: str, value: Tensor) -> fx.Node:
        """A new weight."""
        self.attributes[name] = nn.Parameter(value, requires_grad=False)
        return self.graph.get_attr(name)


class Bits(Protocol):
    """A format of eight bits."""

    def covers(self, weight: Tensor) -> bool:
        """Whether engines have kernels for a product with this weight."""

    def product(self, new: Rewrite, node: fx.Node, name: str, seen: Range) -> fx.Node:
        """The product `node` in the format, with the weight `name`, of an input that has the range `seen`."""


class _Int8:
    """Activations asymmetric uint8 with a scale a tensor, weights symmetric int8 with a scale an output channel.

    A product reads both through a dequantize node, the form that engines fuse into an int8 kernel ("QDQ" in
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
    """

    def covers(self, weight: Tensor) -> bool:
        return True

    def product(self, new: Rewrite, node: fx.Node, name: str, seen: Range) -> fx.Node:
        [source, _, *rest] = node.args
        assert isinstance(source, fx.Node)
        if source not in new.rounded:
            operands = (new.copies[source], seen.scale, seen.zero)
            new.rounded[source] = new.graph.call_function(ROUNDED, operands)
        value, stem = new.attributes[name], name.replace(".", "_")
        int8, scale = _quantized(value.flatten(1) if node.target is aten.linear.default else value)
        parts = (new.parameter(f"{stem}_int8", int8), new.parameter(f"{stem}_scale", scale))
        weight = new.graph.call_function(DEQUANTIZED, parts)
        others = fx.map_arg(tuple(rest), new.copies.__getitem__)
        return _product(new.graph, node, new.rounded[source], weight, others)


class _Fp8:
    """Linear layers with both operands e4m3 and a scale a tensor, https://arxiv.org/abs/2209.05433.

    That is what the tensor cores of every GPU with fp8 multiply; their rows are multiples of 16.
    """

    def covers(self, weight: Tensor) -> bool:
        return weight.dim() == 2 and not any(size % 16 for size in weight.shape)

    def product(self, new: Rewrite, node: fx.Node, name: str, seen: Range) -> fx.Node:
        [source, _, *rest] = node.args
        assert isinstance(source, fx.Node)
        value = new.attributes[name].detach()
        scale = max(float(value.abs().max()), 1e-30) / E4M3
        fp8 = (value / scale).clamp(-E4M3, E4M3).to(torch.float8_e4m3fn)
        weight = new.parameter(f"{name.replace('.', '_')}_fp8", fp8)
        [bias] = fx.map_arg(tuple(rest), new.copies.__getitem__) or (None,)
        operands = (new.copies[source], weight, bias, seen.largest / E4M3, scale)
        # By its name a cast knows what was observed of it.
        return new.graph.create_node("call_function", ops.linear_fp8.default, operands, name=node.name)


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
    new = Rewrite(graph=fx.Graph(), attributes=attributes, copies={}, rounded={})
    for node in module.graph.nodes:
        if node in nodes:
            new.copies[node] = bits.product(new, node, nodes[node], ranges[nodes[node]])
        else:
            new.copies[node] = new.graph.node_copy(node, new.copies.__getitem__)
    new.graph.eliminate_dead_code()
    read = {node.target for node in new.graph.nodes if node.op == "get_attr"}
    return fx.GraphModule({name: value for name, value in attributes.items() if name in read}, new.graph)


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


ROUNDED, DEQUANTIZED = ops.rounded.default, ops.dequantized.default
"""What a product in int8 reads: its operands, rounded, in fp32."""


def _onnx_rounded(x: Any, scale: float, zero: int) -> Any:
    step, offset = onnx.Constant(value_float=scale), onnx.Cast(onnx.Constant(value_int=zero), to=_UINT8)
    return onnx.DequantizeLinear(onnx.QuantizeLinear(x, step, offset), step, offset)


def _onnx_dequantized(weight: Any, scale: Any) -> Any:
    return onnx.DequantizeLinear(weight, scale, axis=0)


def _onnx_linear_fp8(x: Any, weight: Any, bias: Any, x_scale: float, weight_scale: float) -> Any:
    step = onnx.CastLike(onnx.Constant(value_float=x_scale), x)
    zero = onnx.Cast(onnx.Constant(value_float=0.0), to=_E4M3)
    rounded = onnx.DequantizeLinear(onnx.QuantizeLinear(x, step, zero), step, zero)
    matrix = onnx.DequantizeLinear(weight, onnx.CastLike(onnx.Constant(value_float=weight_scale), x))
    product = onnx.MatMul(rounded, onnx.Transpose(matrix, perm=[1, 0]))
    return product if bias is None else onnx.Add(product, onnx.CastLike(bias, x))


IN_ONNX: dict[Callable[..., Any], Callable[..., Any]] = {
    ROUNDED: _onnx_rounded,
    DEQUANTIZED: _onnx_dequantized,
    ops.linear_fp8.default: _onnx_linear_fp8,
}
"""What the exporter makes of these operators."""
