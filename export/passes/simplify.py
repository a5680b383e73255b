"""Drop what tracing leaves behind and inference does not need: assertions, dropout, casts to the same dtype.

Other casts say the dtype alone: a graph has no say in the device that it runs on.
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
_CHECKS = {aten._assert_tensor_metadata.default, aten._assert_scalar.default}
_IDENTITIES = {aten.dropout.default, aten.contiguous.default, aten.alias.default, aten.clone.default}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.to.device}


def simplify(module: fx.GraphModule) -> fx.GraphModule:
    """The same function with fewer nodes; the graph is changed in place and returned."""
    for node in list(module.graph.nodes):
        if node.target in _CHECKS:
            module.graph.erase_node(node)
        elif node.target in _IDENTITIES or (node.target in _CASTS and _keeps_dtype(node)):
            node.replace_all_uses_with(node.all_input_nodes[0])
            module.graph.erase_node(node)
        elif node.target in _CASTS:
            node.target, node.kwargs = aten._to_copy.default, {"dtype": node.meta["val"].dtype}
            node.args = (node.all_input_nodes[0],)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _keeps_dtype(node: fx.Node) -> bool:
    return bool(node.all_input_nodes[0].meta["val"].dtype == node.meta["val"].dtype)
