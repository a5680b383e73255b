"""Scale what leaves fp16 back into its range, by powers of two that norms and weights absorb.

Between products and norms a network is linear: scaled by s, a residual stream scales its sums, copies and upsampled
pixels with it, a norm with ε · s² gives what it gave, and with other weights a product reads or writes another scale:

    conv(s · x; w · t / s, b · t) = t · conv(x; w, b)          norm(s · x; ε · s²) = norm(x; ε)

So each set of values that must share a scale gets the largest power of two that keeps its largest value in range. A
power of two changes no digit: in fp32 the result is the same but for values near the format's other end. That end is
near in fp16: below 6e-5 a weight that is scaled down loses digits. A set of values stays unscaled, and so in fp32,
where that would cost one of its weights more than fp16 rounds anyway, 2^-11 of its length. The autoencoder of SDXL is
the network that needs all this: its residual stream leaves fp16.

Driven by operations and measured values; knows no layer names.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from rt.export.observe import Observation
from rt.export.passes.shapes import module_of, value

aten = torch.ops.aten
_PRODUCTS = {aten.conv2d.default, aten.linear.default}
_NORMS = {aten.group_norm.default, aten.layer_norm.default}
_NORM_DEFAULTS = (None, None, None, None, 1e-5)
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_COPIES = {
    aten.cat.default,
    aten.chunk.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.upsample_nearest2d.vec,
    aten.view.default,
    operator.getitem,
}


def rescale(module: fx.GraphModule, seen: Observation, largest: float) -> fx.GraphModule:
    """The same function, with the values beyond `largest` scaled below it where that can be done in fp16.

    Args:
        module: A graph in fp32; changed in place, unless nothing is to do.
        seen: A run of it.
        largest: The largest absolute value that is in range.
    """
    scales = _scales(module, seen, largest)
    if not scales:
        return module
    for node in list(module.graph.nodes):
        if node.target in _PRODUCTS:
            before, after = scales.get(node.args[0], 1.0), scales.get(node, 1.0)
            _scale_parameter(module, node, 1, after / before)
            _scale_parameter(module, node, 2, after)
        elif node.target in _NORMS and node.args[0] in scales:
            *arguments, epsilon = [*node.args, *_NORM_DEFAULTS[len(node.args) :]][: len(_NORM_DEFAULTS)]
            node.args = (*arguments, epsilon * scales[node.args[0]] ** 2)
    return module_of(module, module.graph)


def _scales(module: fx.GraphModule, seen: Observation, largest: float) -> dict[fx.Node, float]:
    """The scale of every node that gets one other than 1."""
    groups = _Groups()
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in _PRODUCTS:
            if all(_is_parameter(argument) for argument in node.args[1:3]):
                groups.join(node)
            else:
                groups.pin(node, *node.all_input_nodes)
        elif node.op == "call_function" and node.target in _NORMS:
            groups.pin(node)
        elif node.op == "call_function" and _is_linear(node):
            groups.join(node, *node.all_input_nodes)
        else:
            groups.pin(node, *node.all_input_nodes)
    scales: dict[fx.Node, float] = {}
    for group in groups.free():
        reached = max(seen.magnitudes.get(node.name, 0.0) for node in group)
        if reached > largest:
            scale = 2.0 ** -math.ceil(math.log2(reached / largest))
            scales |= dict.fromkeys(group, scale)
    products = [node for node in module.graph.nodes if node.target in _PRODUCTS]
    while lossy := next((node for node in products if _loses_digits(node, scales)), None):
        group = next(group for group in groups.free() if lossy in group)
        scales = {node: scale for node, scale in scales.items() if node not in group}
    return scales


def _loses_digits(product: fx.Node, scales: dict[fx.Node, float]) -> bool:
    """Whether fp16 holds the scaled weight less well than it holds numbers in range."""
    operands: tuple[Any, ...] = product.args
    factor = scales.get(product, 1.0) / scales.get(operands[0], 1.0)
    if factor >= 1.0:
        return False
    weight = value(operands[1]).detach() * factor
    lost = torch.linalg.vector_norm(weight.half().float() - weight)
    return bool(lost > torch.finfo(torch.float16).eps / 2 * torch.linalg.vector_norm(weight))


def _is_linear(node: fx.Node) -> bool:
    """Whether the result scales as its operands do, all by one factor."""
    operands: tuple[Any, ...] = node.args
    if node.target in _SUMS:
        return not node.kwargs and all(isinstance(operand, fx.Node) for operand in operands)
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return isinstance(operands[0], fx.Node) and not isinstance(operands[1], fx.Node)
    return node.target in _COPIES


def _is_parameter(argument: object) -> bool:
    """Whether it is left out, or a weight that can be another one."""
    if not isinstance(argument, fx.Node):
        return argument is None
    return argument.op == "get_attr" and isinstance(value(argument), nn.Parameter)


def _scale_parameter(module: fx.GraphModule, node: fx.Node, position: int, factor: float) -> None:
    """Let `node` read its parameter times `factor`, a copy: another program may read the one that is there."""
    parameter = node.args[position] if len(node.args) > position else None
    if factor == 1.0 or not isinstance(parameter, fx.Node):
        return
    name = f"rescaled_{node.name}_{position}"
    weight: Tensor = value(parameter)
    module.register_parameter(name, nn.Parameter(weight.detach() * factor, requires_grad=False))
    with module.graph.inserting_before(node):
        node.update_arg(position, module.graph.get_attr(name))


class _Groups:
    """Sets of nodes that share a scale; one that holds a pinned node has scale 1."""

    def __init__(self) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        self._pinned: set[fx.Node] = set()

    def pin(self, *nodes: fx.Node) -> None:
        self._pinned |= {self._root(node) for node in nodes}

    def join(self, first: fx.Node, *others: fx.Node) -> None:
        for node in (first, *others):
            one, two = self._root(first), self._root(node)
            self._parent[two] = one
            if two in self._pinned:
                self._pinned.add(one)

    def free(self) -> list[list[fx.Node]]:
        sets: dict[fx.Node, list[fx.Node]] = {}
        for node in self._parent:
            sets.setdefault(self._root(node), []).append(node)
        return [nodes for root, nodes in sets.items() if root not in self._pinned]

    def _root(self, node: fx.Node) -> fx.Node:
        self._parent.setdefault(node, node)
        while self._parent[node] is not node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node
