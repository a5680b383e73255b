"""Compute at the build what depends on no input, and drop arithmetic that changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from rt.export.passes.shapes import attribute, module_of, value

aten = torch.ops.aten
_NEUTRAL = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1}
_RESHAPES = {aten.view.default, aten.reshape.default, aten.expand.default}


def fold(module: fx.GraphModule) -> fx.GraphModule:
    """The same function; constants become buffers of the module, which is changed in place."""
    constant: dict[fx.Node, Tensor] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            constant[node] = attribute(node)
        elif node.op == "call_function" and all(read in constant for read in node.all_input_nodes):
            arguments, options = fx.map_arg((node.args, node.kwargs), constant.__getitem__)
            result = node.target(*arguments, **options)
            if isinstance(result, Tensor):
                constant[node] = result
        elif node.op == "call_function" and _changes_nothing(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
    made = [
        node for node in constant if node.op == "call_function" and not set(node.users) <= constant.keys()
    ]
    for index, node in enumerate(made):
        name = f"folded_{index}"
        module.register_buffer(name, constant[node])
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(name))
    return module_of(module, module.graph)


def _changes_nothing(node: fx.Node) -> bool:
    """x + 0, x · 1 and the like, and a view of the shape that there is."""
    operands: tuple[Any, ...] = node.args
    source, result = operands[0], value(node)
    if not isinstance(source, fx.Node) or not isinstance(result, Tensor):
        return False
    if node.target in _NEUTRAL:
        neutral = operands[1] == _NEUTRAL[node.target] and not node.kwargs
    else:
        neutral = node.target in _RESHAPES
    return neutral and value(source).shape == result.shape and value(source).dtype == result.dtype
