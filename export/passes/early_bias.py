"""Add the bias of a convolution to what is computed once a schedule, and not in every step.

A residual block adds the projected timestep to what its first convolution gives, and both have a bias:

    (conv(x; w) + b) + (linear(e; v) + c) = conv(x; w) + (linear(e; v) + (b + c))

So one sum a pixel is left. Its other operand is then the same for all pixels of a row, and a norm that follows can take
it in, see `rt.export.passes.merge`. Driven by data dependence; knows no layer names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from rt.export.passes.hoist import inputs_of
from rt.export.passes.shapes import module_of, value

aten = torch.ops.aten
_VIEWS = {aten.unsqueeze.default, aten.view.default, aten.reshape.default}


def early_bias(module: fx.GraphModule) -> fx.GraphModule:
    """The same function; parameters that change are copies, as other programs read the ones that are there."""
    reads = inputs_of(module)
    for node in list(module.graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        for first, second in (node.args, node.args[::-1]):
            late, early = _biased(first, aten.conv2d.default), _biased(_viewed(second), aten.linear.default)
            if late is None or value(second).shape[1:] != (value(late).shape[1], 1, 1):
                continue
            if late is not None and early is not None and not reads[early] >= reads[late]:
                _move(module, late, early)
    return module_of(module, module.graph)


def _viewed(node: Any) -> Any:
    """What `node` is a view of that nothing else reads."""
    while isinstance(node, fx.Node) and node.target in _VIEWS and len(node.users) == 1:
        node = node.args[0]
    return node


def _biased(node: Any, target: Any) -> fx.Node | None:
    """`node`, where it is that operation with a bias and one reader."""
    if not isinstance(node, fx.Node) or node.target is not target or len(node.users) != 1:
        return None
    bias = node.args[2] if len(node.args) > 2 else None
    return node if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def _move(module: fx.GraphModule, late: fx.Node, early: fx.Node) -> None:
    name = f"early_bias_{early.name}"
    both = value(early.args[2]) + value(late.args[2])  # type: ignore[arg-type]
    module.register_parameter(name, nn.Parameter(both.detach(), requires_grad=False))
    with module.graph.inserting_before(early):
        early.update_arg(2, module.graph.get_attr(name))
    late.update_arg(2, None)
