"""Move what depends on some inputs alone out of a program, into a program of its own.

The loop runs the rest at every step, and the hoisted part once for each value that these inputs take: for the text of a
U-Net, once a prompt (keys and values of every cross-attention); for the timestep, once a schedule (sinusoid, its MLP,
the projection in every residual block, and in XL all that this makes of the pooled text and the sizes). It also decides
precision: engines compute a bf16 graph in bf16 throughout, where timestep 902 is 904, and its sinusoid noise.

Driven by data dependence; knows no layer names.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from rt.export.passes.shapes import module_of
from rt.export.passes.sink import repeated

aten = torch.ops.aten
_VIEWS = {aten.permute.default, aten.reshape.default, aten.transpose.int, aten.view.default}


def hoist(
    module: fx.GraphModule, sources: Collection[str], name: str
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split `module` into early and late, with late(*early(sources), other inputs) = module(all inputs).

    Args:
        module: A graph.
        sources: The inputs to hoist, in any order.
        name: Of what crosses: early's outputs in order, late's inputs `name_0`, `name_1` … in place of the sources.
    """
    reads = inputs_of(module)
    early = {
        node
        for node, inputs in reads.items()
        if node.op == "call_function" and inputs and inputs <= {*sources}
    }
    for node in reversed(module.graph.nodes):
        # A repeat stays with what needs it: otherwise every row would cross twice. And so do the views that take heads
        # apart, as fused attention wants them together.
        stays = node in early and (repeated(node) is not None or node.target in _VIEWS)
        if stays and early.isdisjoint(node.users):
            early.remove(node)
    crossing = [node for node in module.graph.nodes if node in early and not early.issuperset(node.users)]
    constant = {node for node, inputs in reads.items() if not inputs and node.op != "output"}
    return _early(module, sources, crossing, early | constant), _late(module, sources, name, crossing)


def inputs_of(module: fx.GraphModule) -> dict[fx.Node, set[str]]:
    """Of every node, the inputs of the graph that it depends on."""
    reads: dict[fx.Node, set[str]] = {}
    for node in module.graph.nodes:
        own = {str(node.target)} if node.op == "placeholder" else set()
        reads[node] = own.union(*(reads[read] for read in node.all_input_nodes))
    return reads


def _early(
    module: fx.GraphModule, sources: Collection[str], crossing: list[fx.Node], early: set[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node in early or (node.op == "placeholder" and node.target in sources):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in crossing))
    return module_of(module, graph)


def _late(
    module: fx.GraphModule, sources: Collection[str], name: str, crossing: list[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder" and node.target in sources:
            for index, source in enumerate(crossing):
                if source not in copies:
                    copies[source] = graph.placeholder(f"{name}_{index}")
                    copies[source].meta["val"] = source.meta["val"]
        elif node in copies:
            continue
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], copies.__getitem__))
        elif all(read in copies for read in node.all_input_nodes):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return module_of(module, graph)
