"""Fewer and larger kernels, for a GPU, where each launch costs as much as a few microseconds of work.

A processor runs it in tests.

- Queries, keys and values of the same tokens are one product, and attention reads them side by side.
- What is added to all pixels alike before a GroupNorm is added by it.
- Two linear layers with nothing but a sum between them are one:
  W (V g + r + b) + c = [W V, W] [g; r] + (W b + c), where that is no more work.
- Layers in eight bits read their scales from one constant.
- A convolution is torch's again, all of it in one format.
- A query's projection belongs to its attention, and a linear layer to the GEGLU behind it: operators that a kernel of
  ours computes at once where that is faster, see `rt.export.gpu_operators`.

Runs on a graph after `fuse`. Driven by operations and shapes; knows no layer names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rt.export.operators import ops
from rt.export.passes.shapes import module_of, value

aten = torch.ops.aten
_RESHAPES = {aten.view.default, aten.reshape.default}
_INLINE = 8
"""Constants of so many elements are written into the code."""
_BIAS = 6
"""Its position in the arguments of `rt::group_norm`."""


def merge(module: fx.GraphModule) -> fx.GraphModule:
    """The same function in a graph of its own, whose weights are those of `module`, whatever else has its graph."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    module = fx.GraphModule(module, graph)
    _keep_scales(module)
    for node in list(graph.nodes):
        match = _MATCHES.get(node.target)
        if match is not None:
            with graph.inserting_before(node):
                merged = match(module, node)
            if merged is not None:
                merged.meta["val"] = value(node)
                node.replace_all_uses_with(merged)
    return module_of(module, graph)


def _keep_scales(module: fx.GraphModule) -> None:
    """The scales of all layers in eight bits, in one constant: each would be a kernel that makes it."""
    layers = [node for node in module.graph.nodes if node.target is ops.linear_fp8.default]
    rows = [[*node.args[3:5]] for node in layers]
    if not rows:
        return
    module.register_buffer("scales", torch.tensor(rows + [[1.0, 1.0]] * _INLINE))
    with module.graph.inserting_before(layers[0]):
        scales = module.graph.get_attr("scales")
    for row, node in enumerate(layers):
        with module.graph.inserting_before(node):
            node.args = (*node.args, module.graph.call_function(aten.select.int, (scales, 0, row)))


def _attention(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    query, key, given, heads = node.args
    products = [_linear(operand) for operand in (query, key, given)]
    first = products[0]
    if first is None:
        return None
    x, weight, bias = _arguments(first)
    parts = [_arguments(product) for product in products if product is not None]
    alike = all(part[0] is x and (part[2] is None) == (bias is None) for part in parts)
    if len(parts) == 3 and alike and len({value(part[1]).shape for part in parts}) == 1:
        packed = [_packed(module, node, [part[position] for part in parts]) for position in (1, 2)]
        product = node.graph.call_function(aten.linear.default, (x, *packed))
        return node.graph.call_function(ops.self_attention.default, (product, heads))
    if bias is None:
        return node.graph.call_function(ops.query_attention.default, (x, weight, key, given, heads))
    return None


def _packed(module: fx.GraphModule, node: fx.Node, parts: Sequence[fx.Node | None]) -> fx.Node | None:
    """One parameter of several, row after row."""
    weights: list[Tensor] = [value(part).detach() for part in parts if part is not None]
    return _new(module, node, torch.cat(weights)) if weights else None


def _new(module: fx.GraphModule, node: fx.Node, weight: Tensor) -> fx.Node:
    """A parameter for what takes the place of `node`; its own may be another program's, too."""
    name = f"merged_{node.name}_{weight.dim()}"
    module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return module.graph.get_attr(name)


def _parameter(node: fx.Node) -> Tensor | None:
    """The matrix that `node` is, also where it is the filter of a 1 × 1 convolution."""
    if node.target in _RESHAPES and node.all_input_nodes[0].op == "get_attr":
        return value(node.all_input_nodes[0]).detach().reshape(value(node).shape)  # type: ignore[no-any-return]
    return value(node).detach() if node.op == "get_attr" else None


def _composed(module: fx.GraphModule, outer: fx.Node) -> fx.Node | None:
    x, weight, bias = _arguments(outer)
    total = x.args[0] if x.target in _RESHAPES and len(x.users) == 1 else x
    if not isinstance(total, fx.Node) or total.target is not aten.add.Tensor or len(total.users) != 1:
        return None
    for inner, rest in (total.args, total.args[::-1]):
        if total.kwargs or _linear(inner) is None or not isinstance(rest, fx.Node):
            continue
        gate, second, offset = _arguments(inner)  # type: ignore[arg-type]
        channels = value(total).shape[-1]
        if value(rest).shape != value(total).shape or value(x).shape[-1] != channels:
            continue
        if value(outer).shape[-1] > channels:
            continue
        w, v = _parameter(weight), _parameter(second)
        if w is None or v is None:
            continue
        shift = w.new_zeros(len(w)) if bias is None else value(bias).detach()
        shift = shift if offset is None else shift + w @ value(offset).detach()
        parameters = [_new(module, outer, torch.cat([w @ v, w], 1)), _new(module, outer, shift)]
        both: fx.Node = outer.graph.call_function(aten.cat.default, ([gate, rest], -1))
        if total is not x:
            shape = [*value(x).shape[:-1], w.shape[1] + v.shape[1]]
            both = outer.graph.call_function(aten.reshape.default, (both, shape))
        return outer.graph.call_function(aten.linear.default, (both, *parameters))
    return None


def _geglu(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    product = _linear(node.args[0])
    if product is None:
        return None
    x, weight, bias = _arguments(product)
    return None if bias is None else node.graph.call_function(ops.geglu_linear.default, (x, weight, bias))


def _convolution(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """torch's own, whose bias is in the format of the rest; our kernels for a processor want it in fp32."""
    x, weight, bias = node.args
    call = node.graph.call_function
    pixels = call(aten.permute.default, (x, [0, 3, 1, 2]))
    y = call(aten.conv2d.default, (pixels, weight, bias, [1, 1], [1, 1]))
    return call(aten.permute.default, (y, [0, 2, 3, 1]))


def _short_bias(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """A bias of up to eight elements would be written into the code, and made of it by a kernel: so it is padded."""
    x, weight, bias, *rest = (*node.args, None)[: max(3, len(node.args))]
    if not isinstance(bias, fx.Node) or bias.op != "get_attr" or (count := len(value(bias))) > _INLINE:
        return None
    padded = _new(module, node, nn.functional.pad(value(bias).detach(), (0, 2 * _INLINE - count)))
    short = node.graph.call_function(aten.slice.Tensor, (padded, 0, 0, count))
    return node.graph.call_function(node.target, (x, weight, short, *rest), node.kwargs)  # type: ignore[arg-type]


def _group_norm(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """With a bias: what was added before, or zeros, so that one kernel does for both."""
    if len(node.args) > _BIAS:
        return None
    x, bias = (
        _biased(node.args[0])
        or _convolved(module, node.args[0])
        or (node.args[0], _buffer(module, torch.zeros(1, value(node).shape[-1]), "zeros"))
    )
    return node.graph.call_function(node.target, (x, *node.args[1:], bias))  # type: ignore[arg-type]


def _biased(total: Any) -> tuple[fx.Node, fx.Node] | None:
    """x and b (B or 1, C) where `total`, read once, is x (B, …, C) plus b for all pixels alike."""
    if total.target is not aten.add.Tensor or total.kwargs or len(total.users) != 1:
        return None
    shape = value(total).shape
    for x, added in (total.args, total.args[::-1]):
        if not isinstance(x, fx.Node) or not isinstance(added, fx.Node) or value(x).shape != shape:
            continue
        if value(added).dim() == len(shape) and value(added).shape[1:] == (
            *[1] * (len(shape) - 2),
            shape[-1],
        ):
            return x, total.graph.call_function(
                aten.reshape.default, (added, [*value(added).shape[:: len(shape) - 1]])
            )
    return None


def _convolved(module: fx.GraphModule, pixels: Any) -> tuple[fx.Node, fx.Node] | None:
    """A convolution without its bias, and the bias, where `pixels` is both; what else reads `pixels` adds them."""
    call, graph = pixels.graph.call_function, pixels.graph
    convolution = pixels.args[0] if pixels.target is aten.permute.default else None
    if not isinstance(convolution, fx.Node) or convolution.target is not aten.conv2d.default:
        return None
    x, weight, bias, *rest = (*convolution.args, None)[: max(3, len(convolution.args))]
    if not isinstance(bias, fx.Node) or bias.op != "get_attr" or value(pixels).shape[-1] != len(value(bias)):
        return None
    with graph.inserting_before(pixels):
        alone = call(
            aten.permute.default, (call(aten.conv2d.default, (x, weight, None, *rest)), pixels.args[1])
        )
        both = call(aten.add.Tensor, (alone, bias))
    for made in (alone, both):
        made.meta["val"] = value(pixels)
    pixels.replace_all_uses_with(both)
    return alone, _buffer(module, value(bias).detach()[None], f"bias_{bias.name}")


def _buffer(module: fx.GraphModule, values: Tensor, name: str) -> fx.Node:
    """A constant in fp32, as norms take it."""
    name = f"{name}_{values.shape[-1]}"
    if not hasattr(module, name):
        module.register_buffer(name, values)
    return module.graph.get_attr(name)


def _linear(node: Any) -> fx.Node | None:
    """`node` where it is a linear layer that has one reader and its own weight."""
    if not isinstance(node, fx.Node) or node.target is not aten.linear.default or len(node.users) != 1:
        return None
    _, weight, bias = _arguments(node)
    return node if weight.op == "get_attr" and (bias is None or bias.op == "get_attr") else None


def _arguments(linear: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    x, weight, *bias = linear.args
    return x, weight, (bias[0] if bias else None)  # type: ignore[return-value]


_MATCHES: dict[object, Callable[[fx.GraphModule, fx.Node], fx.Node | None]] = {
    aten.conv2d.default: _short_bias,
    aten.linear.default: _composed,
    ops.convolution.default: _convolution,
    ops.attention.default: _attention,
    ops.geglu.default: _geglu,
    ops.group_norm.default: _group_norm,
}
