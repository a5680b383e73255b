"""Linear layers and convolutions in int8, with what was measured of their inputs.

Weights are symmetric int8 with a scale an output channel, activations asymmetric uint8 with one scale a tensor. A
product reads both through a dequantize node, the form that engines fuse into an int8 kernel
(https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "QDQ format").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import onnxscript
import torch
from torch import Tensor, fx, nn
from onnxscript.values import Opset

aten = torch.ops.aten
op = onnxscript.opset21
PRODUCTS = (aten.linear.default, aten.conv2d.default)


@torch.library.custom_op("rt::quantized", mutates_args=())
def quantized(x: Tensor, scale: float, zero: int) -> Tensor:
    """x (any shape, fp32) rounded to `scale * (q - zero)` with q in 0…255."""
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


@quantized.register_fake
def _(x: Tensor, scale: float, zero: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("rt::dequantized", mutates_args=())
def dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 weight (O, …) times scale (O,)."""
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))


@dequantized.register_fake
def _(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=torch.float32)


def _lower_quantized(x, scale: float, zero: int):
    s = op.Constant(value_float=scale)
    z = op.Cast(op.Constant(value_int=zero), to=2)
    return op.DequantizeLinear(op.QuantizeLinear(x, s, z), s, z)


def _lower_dequantized(weight, scale):
    return op.DequantizeLinear(weight, scale, axis=0)


TRANSLATIONS = {
    torch.ops.rt.quantized.default: _lower_quantized,
    torch.ops.rt.dequantized.default: _lower_dequantized,
}


def quantize(module: fx.GraphModule, ranges: Mapping[str, tuple[float, float]], skip=frozenset()) -> fx.GraphModule:
    attributes: dict[str, Any] = {n.target: reduce(getattr, n.target.split("."), module) for n in module.graph.nodes if n.op == "get_attr"}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    rounded: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.target in PRODUCTS and node.name not in skip:
            x, w, *rest = node.args
            if x not in rounded:
                low, high = (min(ranges[x.name][0], 0), max(ranges[x.name][1], 0))
                scale = (high - low) / 255
                zero = round(-low / scale)
                rounded[x] = graph.call_function(torch.ops.rt.quantized.default, (copies[x], scale, zero))
            weight = attributes[w.target].detach()
            s = weight.abs().flatten(1).amax(1).clamp(min=1e-30) / 127
            name = w.target.replace(".", "_")
            q = torch.round(weight / s.reshape(-1, *[1] * (weight.dim() - 1))).to(torch.int8)
            attributes[name + "_int8"] = nn.Parameter(q, requires_grad=False)
            attributes[name + "_scale"] = nn.Parameter(s, requires_grad=False)
            wn = graph.call_function(torch.ops.rt.dequantized.default, (graph.get_attr(name + "_int8"), graph.get_attr(name + "_scale")))
            copies[node] = graph.call_function(node.target, (rounded[x], wn, *fx.map_arg(tuple(rest), copies.__getitem__)), node.kwargs)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.eliminate_dead_code()
    keep = {n.target for n in graph.nodes if n.op == "get_attr"}
    return fx.GraphModule({k: v for k, v in attributes.items() if k in keep}, graph)
