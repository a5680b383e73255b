"""What one run of a graph costs, from the shapes on its nodes.

FLOPs are those of products (two a multiply-add), the work that processors are rated in. Bytes are what an engine moves
that fuses nothing: each operation reads its operands, weights included, and writes its result; views are free.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rt.export.passes.shapes import value

aten = torch.ops.aten

VIEWS = {
    operator.getitem,
    aten.chunk.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.squeeze.dim,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
}


@dataclass(frozen=True)
class Cost:
    """Of one run: operations, their floating-point work, and the bytes that they move."""

    nodes: int
    flops: int
    bytes: int


def cost(module: fx.GraphModule) -> Cost:
    """Of every operation of `module`."""
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    return Cost(len(calls), sum(map(flops, calls)), sum(map(moved, calls)))


def flops(node: fx.Node) -> int:
    """Of a product, 0 of anything else."""
    formula = FLOPS.get(node.target)
    return 0 if formula is None else formula(node)


def moved(node: fx.Node) -> int:
    """Bytes that an operation reads and writes."""
    if node.target in VIEWS:
        return 0
    return _bytes(value(node)) + sum(_bytes(value(read)) for read in node.all_input_nodes)


def _bytes(result: Any) -> int:
    if isinstance(result, Tensor):
        return result.numel() * result.element_size()
    return sum(map(_bytes, result)) if isinstance(result, list | tuple) else 0


def _shape(argument: Any) -> tuple[int, ...]:
    return tuple(value(argument).shape)


def _weighted(node: fx.Node) -> int:
    """linear (…, I) by (O, I), convolution (N, C, …) by (O, C/groups, …): each output sums one filter."""
    return 2 * math.prod(_shape(node)) * math.prod(_shape(node.args[1])[1:])


def _product(node: fx.Node) -> int:
    """(…, M, K) by (…, K, N)."""
    return 2 * math.prod(_shape(node)) * _shape(node.args[0])[-1]


def _attention(node: fx.Node) -> int:
    """Queries (…, L, d) by keys (…, S, d), and the weights (…, L, S) by values (…, S, e)."""
    *_, tokens, size = _shape(node.args[1])
    return 2 * math.prod(_shape(node)[:-1]) * tokens * (size + _shape(node.args[2])[-1])


FLOPS: dict[Any, Callable[[fx.Node], int]] = {
    aten.linear.default: _weighted,
    aten.conv2d.default: _weighted,
    aten.matmul.default: _product,
    aten.bmm.default: _product,
    aten.scaled_dot_product_attention.default: _attention,
}
"""Of each product; a pass that makes operations of its own adds theirs."""
