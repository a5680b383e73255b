"""Move the repeat of guidance below the first operation whose rows truly differ.

Under classifier-free guidance both halves of the batch carry the same latents and the same timestep until they meet the
text. A value of which both halves are equal is computed once, and repeated where an operation mixes it with one whose
halves differ: so convolutions, norms and self-attention before the first cross-attention run at half batch, and a skip
connection stays half until it is joined.

Of every value the pass knows whether it is two copies of one value, one after the other along dimension 0, as after
`cat([x, x])`. Driven by data dependence and shapes; knows no layer names.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from rt.export.passes.shapes import module_of, value

aten = torch.ops.aten
_ELEMENTWISE = {
    aten.add.Tensor,
    aten.cos.default,
    aten.div.Tensor,
    aten.exp.default,
    aten.gelu.default,
    aten.mul.Tensor,
    aten.sigmoid.default,
    aten.silu.default,
    aten.sin.default,
    aten.sub.Tensor,
}
# The first operand has the rows, the others are weights.
_WEIGHTED = {
    aten.conv2d.default,
    aten.group_norm.default,
    aten.layer_norm.default,
    aten.linear.default,
    aten.upsample_nearest2d.vec,
}
# Row i of the result is made of row i of every operand.
_ROWS = {aten.bmm.default, aten.scaled_dot_product_attention.default}
# Operation to the position of its dimension, and what that is by default.
_ALONG = {
    aten.cat.default: (1, 0),
    aten.chunk.default: (2, 0),
    aten.concat.default: (1, 0),
    aten.select.int: (1, 0),
    aten.slice.Tensor: (1, 0),
    aten.softmax.int: (1, 0),
    aten.split.Tensor: (2, 0),
    aten.unsqueeze.default: (1, 0),
}
# Memory in order is two copies before and after.
_SHAPES = {aten.reshape.default, aten.view.default}


def repeated(node: fx.Node) -> fx.Node | None:
    """x where `node` is `cat([x, x])` along dimension 0."""
    if node.target not in (aten.cat.default, aten.concat.default) or (*node.args, 0)[1] != 0:
        return None
    parts: Any = node.args[0]
    return parts[0] if len(parts) == 2 and parts[0] is parts[1] else None


def sink(module: fx.GraphModule) -> fx.GraphModule:
    """The same function, each value whose halves are equal computed once; without a repeat the same graph."""
    graph = fx.Graph()
    whole: dict[fx.Node, fx.Node] = {}
    half: dict[fx.Node, fx.Node] = {}

    def all_rows(node: fx.Node) -> fx.Node:
        if node not in whole:
            whole[node] = graph.call_function(aten.cat.default, ([half[node], half[node]],))
        return whole[node]

    for node in module.graph.nodes:
        source = repeated(node)
        if source is not None and source in whole:
            half[node] = whole[source]
        elif _acts_on_rows(node, half):
            half[node] = graph.node_copy(node, lambda n: half[n] if n in half else whole[n])
            half[node].args = _half_shape(node, half[node].args)
            half[node].meta = {k: v for k, v in node.meta.items() if k != "val"}
        else:
            # One row meets two as it is: operations between elements repeat it themselves.
            for read in {*node.all_input_nodes} - _single_rows(node, half):
                all_rows(read)
            whole[node] = graph.node_copy(node, lambda n: whole[n] if n in whole else half[n])
    return module_of(module, graph)


def _acts_on_rows(node: fx.Node, half: Collection[fx.Node]) -> bool:
    """Whether `node` gives two copies of what it gives for one of the two in each operand."""
    reads = node.all_input_nodes
    if node.op != "call_function" or not any(read in half for read in reads):
        return False
    if node.target is operator.getitem:
        return True
    first = value(reads[0])
    if node.target in _ELEMENTWISE:
        rank = len(value(node).shape)
        return all(
            value(read).ndim == rank if read in half else value(read).ndim < rank or len(value(read)) == 1
            for read in reads
        )
    if node.target in _WEIGHTED:
        spared = first.ndim - len(node.args[1]) if node.target is aten.layer_norm.default else first.ndim - 1  # type: ignore[arg-type]
        return reads[0] in half and spared > 0 and not any(read in half for read in reads[1:])
    if not all(read in half for read in reads):
        return False
    if node.target in _ALONG:
        position, default = _ALONG[node.target]
        dim: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
        rank = first.ndim + (node.target is aten.unsqueeze.default)
        return bool(dim % rank != 0)
    if node.target in _SHAPES:
        return bool(value(node).shape[0] % 2 == 0)
    if node.target is aten.expand.default:
        return bool(value(node).ndim == first.ndim and value(node).shape[0] == first.shape[0])
    if node.target is aten.transpose.int:
        dims: Any = node.args[1:3]
        return all(dim % first.ndim != 0 for dim in dims)
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        return bool(order[0] % first.ndim == 0)
    return node.target in _ROWS


def _single_rows(node: fx.Node, half: Collection[fx.Node]) -> set[fx.Node]:
    """The operands that need one row of their two, beside another operand that has two."""
    if node.target not in _ELEMENTWISE:
        return set()
    paired = {r for r in node.all_input_nodes if value(r).ndim == value(node).ndim and value(r).shape[0] == 2}
    return {read for read in paired if read in half} if any(read not in half for read in paired) else set()


def _half_shape(node: fx.Node, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a view, of half as many rows."""
    if node.target not in _SHAPES and node.target is not aten.expand.default:
        return arguments
    source, (rows, *rest) = arguments[0], arguments[1]
    return (source, [rows if rows == -1 else rows // 2, *rest], *arguments[2:])
