"""Channels last: move the axis of channels behind the pixels, where products and norms read it in one piece.

A convolution, a norm and what lies between them compute on (N, pixels, C); a value is moved back where something asks
for it as it was, and the moves of neighbours cancel. 1 × 1 convolutions become linear layers, and the transposes around
attention vanish, because tokens are pixels with their channels last.

Driven by operations and shapes; knows no layer names.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from rt.export.operators import ops
from rt.export.passes.shapes import module_of, value

aten = torch.ops.aten
_ELEMENTWISE = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.silu.default,
    aten.gelu.default,
}
_RESHAPES = {aten.view.default, aten.reshape.default}
# What the kernel for 3 × 3 reads and writes at a time.
_IN, _OUT = 32, 16


def channels_last(module: fx.GraphModule) -> fx.GraphModule:
    """The same function, with the same inputs and outputs."""
    layout = _Layout()
    for node in module.graph.nodes:
        if node.op == "output":
            layout.graph.output(fx.map_arg(node.args[0], layout.as_it_was))
        elif not (node.op == "call_function" and layout.move(node)):
            layout.was[node] = layout.graph.node_copy(node, layout.as_it_was)
    return module_of(module, layout.graph)


class _Layout:
    """The new graph, and for each old node its value there: as it `was`, `moved`, or both."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.was: dict[fx.Node, fx.Node] = {}
        self.moved: dict[fx.Node, fx.Node] = {}

    def as_it_was(self, node: fx.Node) -> fx.Node:
        if node not in self.was:
            axes = [0, _rank(node) - 1, *range(1, _rank(node) - 1)]
            self.was[node] = self._call(aten.permute.default, self.moved[node], axes)
        return self.was[node]

    def channels_last(self, node: fx.Node) -> fx.Node:
        if node not in self.moved:
            batch, channels, *pixels = value(node).shape
            if {*pixels} == {1}:  # nothing to move: a bias of each channel, made of the timestep
                moved = self._call(aten.reshape.default, self.was[node], [batch, *pixels, channels])
            else:
                axes = [0, *range(2, _rank(node)), 1]
                moved = self._call(aten.permute.default, self.was[node], axes)
            self.moved[node] = moved
        return self.moved[node]

    def move(self, node: fx.Node) -> bool:
        """Compute `node` channels last, if it gains by that or loses nothing; otherwise do nothing and give False."""
        target, arguments = node.target, node.args
        if target is aten.conv2d.default:
            return self._convolution(node)
        if target is aten.group_norm.default:
            x, groups, scale, shift, epsilon = _arguments(node, None, None, None, None, 1e-5)
            if scale is None or shift is None:
                return False
            parameters = [self.as_it_was(parameter) for parameter in (scale, shift)]
            last = self.channels_last(x)
            self.moved[node] = self._call(ops.group_norm.default, last, *parameters, groups, epsilon, False)
        elif target in _ELEMENTWISE and self._alike(node):
            operands = [self.channels_last(x) if isinstance(x, fx.Node) else x for x in arguments]
            self.moved[node] = self.graph.call_function(target, tuple(operands), node.kwargs)
        elif target is aten.cat.default and self._any_moved(node):
            parts, axis = _arguments(node, None, 0)
            moved = [self.channels_last(part) for part in parts]
            axis %= _rank(node)
            behind = [0, _rank(node) - 1, *range(1, _rank(node) - 1)][axis]
            self.moved[node] = self._call(aten.cat.default, moved, behind)
        elif target is aten.upsample_nearest2d.vec and _doubles(node):
            self._double(node)
        elif target in _RESHAPES and self._any_moved(node) and _of_pixels(node):
            shape = [*value(node).shape]
            source = self.moved[node.all_input_nodes[0]]
            self.moved[node] = self._call(aten.reshape.default, source, [shape[0], *shape[2:], shape[1]])
        else:
            return self._permutation(node)
        return True

    def _convolution(self, node: fx.Node) -> bool:
        x, weight, bias, stride, padding, dilation, groups = _arguments(
            node, None, None, None, (1,), (0,), (1,), 1
        )
        (out, channels, *kernel), ones = value(weight).shape, {1}
        if groups != 1 or {*stride} != ones or {*dilation} != ones:
            return False
        if kernel == [1, 1] and {*padding} == {0}:
            matrix = self._call(aten.reshape.default, self.as_it_was(weight), [out, channels])
            last, offset = self.channels_last(x), self._bias(bias)
            self.moved[node] = self._call(aten.linear.default, last, matrix, offset)
            return True
        if kernel == [3, 3] and {*padding} == ones and channels % _IN == 0 and out % _OUT == 0:
            parameters = (self.as_it_was(weight), self._bias(bias))
            self.moved[node] = self._call(ops.convolution.default, self.channels_last(x), *parameters)
            return True
        return False

    def _bias(self, bias: fx.Node | None) -> fx.Node | None:
        return None if bias is None else self.as_it_was(bias)

    def _double(self, node: fx.Node) -> None:
        """Each pixel twice along both axes, as copies of whole rows of channels."""
        batch, channels, height, width = value(node).shape
        rows = [batch, height // 2, width * channels]
        x = self.channels_last(node.all_input_nodes[0])
        wide = self._call(aten.reshape.default, self._call(aten.cat.default, [x, x], 3), rows)
        tall = self._call(aten.cat.default, [wide, wide], 2)
        self.moved[node] = self._call(aten.reshape.default, tall, [batch, height, width, channels])

    def _permutation(self, node: fx.Node) -> bool:
        """A move of the channels that the model makes itself is one of ours, or undoes it."""
        if node.target not in (aten.permute.default, aten.transpose.int) or _rank(node) not in (3, 4):
            return False
        source, rank = node.all_input_nodes[0], _rank(node)
        axes = _axes(node)
        if axes == [0, *range(2, rank), 1] and source in self.moved:
            self.was[node] = self.moved[source]
        elif axes == [0, rank - 1, *range(1, rank - 1)] and source in self.was:
            self.moved[node] = self.was[source]
        else:
            return False
        return True

    def _alike(self, node: fx.Node) -> bool:
        ranks = {_rank(read) for read in node.all_input_nodes}
        return self._any_moved(node) and ranks == {_rank(node)}

    def _any_moved(self, node: fx.Node) -> bool:
        return any(read in self.moved for read in node.all_input_nodes)

    def _call(self, target: Any, *arguments: Any) -> fx.Node:
        return self.graph.call_function(target, arguments)


def _arguments(node: fx.Node, *defaults: Any) -> list[Any]:
    """Positional arguments, and the last of `defaults` for those that were left out."""
    missing = len(defaults) - len(node.args)
    return [*node.args[: len(defaults)], *(defaults[-missing:] if missing > 0 else ())]


def _rank(node: fx.Node) -> int:
    return int(value(node).dim())


def _axes(node: fx.Node) -> list[int]:
    rank, arguments = _rank(node), cast(tuple[Any, ...], node.args)
    if node.target is aten.permute.default:
        return [axis % rank for axis in arguments[1]]
    first, second = (axis % rank for axis in arguments[1:])
    axes = [*range(rank)]
    axes[first], axes[second] = second, first
    return axes


def _doubles(node: fx.Node) -> bool:
    before, after = value(node.all_input_nodes[0]).shape, value(node).shape
    return tuple(after[2:]) == tuple(2 * side for side in before[2:])


def _of_pixels(node: fx.Node) -> bool:
    """Whether a reshape keeps batch and channels, and so only lists the pixels in another way."""
    before, after = value(node.all_input_nodes[0]), value(node)
    return isinstance(after, Tensor) and after.dim() >= 3 and before.shape[:2] == after.shape[:2]
