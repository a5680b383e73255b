"""Split the step of a U-Net into a full one, which keeps its deep features, and a shallow one, which reads them.

Deep features change little from step to step (DeepCache, https://arxiv.org/abs/2312.00858), so a shallow step computes
only what lies between the latents and a late skip connection, and takes from the last full step what the connection
is joined with. The join is found by data dependence and shapes: of all places where two values that depend on the
latents are joined along their channels, the one that leaves the least to compute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rt.errors import BuildError
from rt.export.passes.cost import flops
from rt.export.passes.hoist import inputs_of
from rt.export.passes.shapes import module_of, value

aten = torch.ops.aten


def split_shallow(module: fx.GraphModule, source: str, name: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Full and shallow, where shallow(inputs, deep) = full(inputs)[0] for the deep features full(inputs)[-1].

    Args:
        module: A step.
        source: The input that the shallow step must still see.
        name: Of the deep features (R, C, h, w): full's last output, shallow's last input.

    Raises:
        BuildError: There is no join.
    """
    reads = inputs_of(module)
    cuts = [
        operand
        for node in module.graph.nodes
        if node.target in (aten.cat.default, aten.concat.default) and (*node.args, 0)[1] == 1
        for operand in node.all_input_nodes
        if len(node.all_input_nodes) == 2
        and value(operand).ndim == 4
        and all(source in reads[read] for read in node.all_input_nodes)
    ]
    kept = {cut: _needed(module, cut) for cut in cuts}
    able = {cut: nodes for cut, nodes in kept.items() if any(node.target == source for node in nodes)}
    if not able:
        raise BuildError(
            "this U-Net has no skip connection to cut at, so it has no shallow step; build without --step-cache"
        )
    cut = min(able, key=lambda cut: sum(map(flops, able[cut])))
    return _full(module, cut), _shallow(module, cut, able[cut], name)


def _needed(module: fx.GraphModule, cut: fx.Node) -> set[fx.Node]:
    """What the output depends on when `cut` is given."""
    needed: set[fx.Node] = set()
    left = [node for node in module.graph.nodes if node.op == "output"]
    while left:
        node = left.pop()
        if node not in needed and node is not cut:
            needed.add(node)
            left += node.all_input_nodes
    return needed


def _full(module: fx.GraphModule, cut: fx.Node) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    results: Any = graph.graph_copy(module.graph, copies)
    graph.output((*results, copies[cut]))
    return module_of(module, graph)


def _shallow(module: fx.GraphModule, cut: fx.Node, kept: set[fx.Node], name: str) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node in inputs:
        if node in kept:
            copies[node] = graph.node_copy(node)
    copies[cut] = graph.placeholder(name)
    copies[cut].meta["val"] = cut.meta["val"]
    for node in module.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], copies.__getitem__))
        elif node in kept and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return module_of(module, graph)
