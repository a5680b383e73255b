"""Several operations in one: attention with its heads, GroupNorm with SiLU, GEGLU.

Runs on a graph that is channels last. Driven by operations and shapes; knows no layer names.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from rt.export.operators import ops
from rt.export.passes.shapes import module_of, value

aten = torch.ops.aten
_RESHAPES = {aten.view.default, aten.reshape.default, aten.flatten.using_ints}


def fuse(module: fx.GraphModule) -> fx.GraphModule:
    """The same function; the graph is changed in place."""
    for node in list(module.graph.nodes):
        match = _MATCHES.get(node.target)
        if match is not None:
            with module.graph.inserting_before(node):
                fused = match(node)
            if fused is not None:
                node.replace_all_uses_with(fused)
    # Torch takes attention for random, and would keep it when nothing reads it.
    for node in reversed(module.graph.nodes):
        if node.op == "call_function" and not node.users:
            module.graph.erase_node(node)
    return module_of(module, module.graph)


def _attention(node: fx.Node) -> fx.Node | None:
    """reshape(transpose(attention(heads apart))): (B, L, H · d) of three such."""
    swapped = node.args[0]
    if not isinstance(swapped, fx.Node) or not _swaps_heads(swapped):
        return None
    product = swapped.args[0]
    if not isinstance(product, fx.Node) or product.target is not aten.scaled_dot_product_attention.default:
        return None
    batch, heads, tokens, width = value(product).shape
    if value(node).shape != (batch, tokens, heads * width) or len(product.args) > 3 or product.kwargs:
        return None
    operands = [_joined(cast(fx.Node, operand)) for operand in product.args]
    return node.graph.call_function(ops.attention.default, (*operands, heads))


def _joined(operand: fx.Node) -> fx.Node:
    """(B, S, H · d) from (B, H, S, d): what the heads were split from, or joined again."""
    batch, heads, tokens, width = value(operand).shape
    shape = (batch, tokens, heads * width)
    if _swaps_heads(operand):
        split = operand.args[0]
        if isinstance(split, fx.Node) and split.target in _RESHAPES:
            whole = split.all_input_nodes[0]
            if value(whole).shape == shape:
                return whole
    graph = operand.graph
    if operand.target is aten.cat.default and operand.args[1:] in ((), (0,)):  # the repeat of guidance
        parts: Any = operand.args[0]
        return graph.call_function(aten.cat.default, ([_joined(part) for part in parts], 0))
    swapped = graph.call_function(aten.transpose.int, (operand, 1, 2))
    return graph.call_function(aten.reshape.default, (swapped, list(shape)))


def _swaps_heads(node: fx.Node) -> bool:
    return node.target is aten.transpose.int and node.args[1:] == (1, 2) and value(node).dim() == 4


def _group_norm_silu(node: fx.Node) -> fx.Node | None:
    norm = node.args[0]
    if not isinstance(norm, fx.Node) or norm.target is not ops.group_norm.default or len(norm.users) > 1:
        return None
    if norm.args[-1]:  # has one already
        return None
    return node.graph.call_function(norm.target, (*norm.args[:-1], True))


def _geglu(node: fx.Node) -> fx.Node | None:
    """mul(half 0, gelu(half 1)) of one tensor in two along its last axis."""
    hidden, active = node.args
    if not isinstance(active, fx.Node) or active.target is not aten.gelu.default or active.kwargs:
        return None
    gate = active.args[0]
    if [_half(hidden), _half(gate)] != [0, 1] or hidden.args[0] is not gate.args[0]:  # type: ignore[union-attr]
        return None
    return node.graph.call_function(ops.geglu.default, (hidden.args[0].args[0],))  # type: ignore[union-attr]


def _half(node: object) -> int | None:
    """Which of two halves along the last axis `node` is."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return None
    chunk, index = node.args
    if not isinstance(chunk, fx.Node) or chunk.target is not aten.chunk.default or len(chunk.args) < 3:
        return None
    whole, count, axis = chunk.args
    last = axis in (-1, value(whole).dim() - 1)  # type: ignore[arg-type]
    return index if count == 2 and last else None  # type: ignore[return-value]


_MATCHES: dict[object, Callable[[fx.Node], fx.Node | None]] = {
    aten.silu.default: _group_norm_silu,
    aten.mul.Tensor: _geglu,
    **dict.fromkeys(_RESHAPES, _attention),
}
