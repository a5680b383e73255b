"""Move what depends on one input alone out of a program, into a program of its own.

The loop runs the rest at every step, and the hoisted part once for each value that the input takes. For the
timestep of a U-Net these are the sinusoid, its MLP and the projection in every residual block. It also decides
precision: engines compute a bf16 graph in bf16 throughout, where timestep 902 is 904, and its sinusoid noise.

Driven by data dependence; knows no layer names.
"""

from __future__ import annotations

import math

import torch
from torch import fx

aten = torch.ops.aten


def hoist(module: fx.GraphModule, source: str, name: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split `module` into early and late, with late(early(source), other inputs) = module(all inputs).

    Args:
        module: A graph whose input `source` is (R,): one value a row, as every value made of it alone has R rows.
        source: The input to hoist.
        name: Of what crosses: (R, F), all crossing values side by side; early's output, late's input.
    """
    reads: dict[fx.Node, set[str]] = {}
    for node in module.graph.nodes:
        own = {node.target} if node.op == "placeholder" else set()
        reads[node] = own.union(*(reads[read] for read in node.all_input_nodes))
    crossing = [
        node
        for node, inputs in reads.items()
        if node.op == "call_function"
        and inputs == {source}
        and any(reads[user] != {source} or user.op == "output" for user in node.users)
    ]
    return _early(module, source, crossing, reads), _late(module, source, name, crossing)


def _early(
    module: fx.GraphModule, source: str, crossing: list[fx.Node], reads: dict[fx.Node, set[str]]
) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node, inputs in reads.items():
        if inputs <= {source} and node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    rows = [graph.call_function(aten.flatten.using_ints, (copies[node], 1)) for node in crossing]
    graph.output((graph.call_function(aten.cat.default, (rows, 1)),))
    return _module(module, graph)


def _late(module: fx.GraphModule, source: str, name: str, crossing: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    offset = 0
    for node in module.graph.nodes:
        if node.op == "placeholder" and node.target == source:
            joined = graph.placeholder(name)
        elif node in crossing:
            shape = tuple(node.meta["val"].shape)
            width = math.prod(shape[1:])
            part = graph.call_function(aten.slice.Tensor, (joined, 1, offset, offset + width))
            copies[node] = graph.call_function(aten.reshape.default, (part, shape))
            offset += width
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], copies.__getitem__))
        elif all(read in copies for read in node.all_input_nodes):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return _module(module, graph)


def _module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    graph.eliminate_dead_code()
    return fx.GraphModule(root, graph)
