"""The shapes on the nodes of a graph: read them, and fill in those of nodes that a pass has made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx


def value(node: fx.Node) -> Any:
    """What `node` gives, as a tensor without data or a list of them; a weight is itself."""
    if node.op == "get_attr":
        return attribute(node)
    return node.meta["val"]


def attribute(node: fx.Node) -> Tensor:
    """The weight or constant that a `get_attr` node names."""
    found: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    tensor: Tensor = found
    return tensor


def module_of(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """`graph` with the weights of `root` that it reads, without dead code, with a shape on every node."""
    graph.eliminate_dead_code()
    module = fx.GraphModule(root, graph)
    mode = next(n.meta["val"] for n in module.graph.nodes if n.op == "placeholder").fake_mode
    with mode, torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "call_function" and "val" not in node.meta:
                arguments, options = fx.map_arg((node.args, node.kwargs), lambda n: _fake(n, mode))
                node.meta["val"] = node.target(*arguments, **options)
    return module


def _fake(node: fx.Node, mode: Any) -> Any:
    return (
        mode.from_tensor(attribute(node), static_shapes=True) if node.op == "get_attr" else node.meta["val"]
    )
