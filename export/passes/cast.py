"""Cast a graph to half precision, but for islands of fp32 where half would break it.

Decided by what each op reads, and by what `rt.export.observe` measured on the model's own values:
- products (linear, convolution, attention, embedding) compute in half;
- a norm that would lose more than a few roundings of its result computes in fp32;
- any op that gives or reads a value near the end of the format's range computes in fp32;
- int8 operands stay as they are, and so do the products that read them; what reads fp8 computes in half;
- the rest follows its inputs.
Inputs and outputs of the graph stay fp32, but for those that one program hands to another, as `narrow` says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from rt.config import DType
from rt.export.observe import Observation
from rt.export.operators import HALVES
from rt.export.passes.quantize import DEQUANTIZED, ROUNDED

aten = torch.ops.aten
HALF = {
    DType.FP16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.INT8: torch.bfloat16,
    DType.FP8: torch.float16,
}
"""What the floats of a build are cast to; in an int8 build those of the fused graph."""

_PRODUCTS = {
    aten.linear.default,
    aten.conv2d.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.embedding.default,
    aten.scaled_dot_product_attention.default,
}
# Inputs at run time are larger than those measured at the build; two bits of headroom.
_HEADROOM = 4.0


def cast(
    module: fx.GraphModule, dtype: DType, seen: Observation, narrow: Collection[int] = ()
) -> tuple[nn.Module, tuple[str, ...]]:
    """`module` computing in `dtype`, as a module to trace again, and its islands in words.

    Args:
        module: A graph in fp32.
        dtype: FP16 or BF16.
        seen: A run in fp32, observed for this format.
        narrow: Positions of the outputs that are given as the graph computes them. An input is taken in whatever format
            the cast graph is traced with.
    """
    half = HALF[dtype]
    format = torch.finfo(half)
    limit = in_range(half)
    wide = {name for name, value in seen.magnitudes.items() if value > limit}
    rounded = {node.name for node in module.graph.nodes if node.target in (ROUNDED, DEQUANTIZED)}
    reads = {user.name for node in module.graph.nodes if node.target is DEQUANTIZED for user in node.users}
    wide |= rounded
    islands = rounded | reads
    far: defaultdict[str, list[float]] = defaultdict(list)
    lossy: defaultdict[str, list[float]] = defaultdict(list)
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        touched = [node.name, *(source.name for source in node.all_input_nodes)]
        reached = max(
            [seen.logits.get(node.name, 0.0), *(seen.magnitudes.get(name, 0.0) for name in touched)]
        )
        loss = seen.losses.get(node.name, 0.0)
        if reached > limit:
            far[_name(node)].append(reached)
        elif loss > format.eps:
            lossy[_name(node)].append(loss)
        else:
            continue
        islands.add(node.name)
    words = [
        *(
            f"{len(of)} {op}: reach {max(of):.1e}, format ends at {format.max:.1e}"
            for op, of in sorted(far.items())
        ),
        *(f"{len(of)} {op}: would lose up to {max(of):.1e}" for op, of in sorted(lossy.items())),
    ]
    return _Cast(module, half, islands, wide, narrow), tuple(words)


def _name(node: fx.Node) -> str:
    """Of its operator, for people."""
    return "cast" if node.target is aten._to_copy.default else str(node.target).split(".")[1]


def in_range(half: torch.dtype) -> float:
    """The largest absolute value, of those measured at the build, that the format is trusted with."""
    return torch.finfo(half).max / _HEADROOM


class _Cast(nn.Module):
    def __init__(
        self,
        module: fx.GraphModule,
        half: torch.dtype,
        islands: set[str],
        wide: set[str],
        narrow: Collection[int],
    ) -> None:
        super().__init__()
        weights = {
            node.target: _weight(module, node, half, islands)
            for node in module.graph.nodes
            if node.op == "get_attr"
        }
        self.format, self.islands, self.wide, self.narrow = half, islands, wide, narrow
        self.graph_module = fx.GraphModule(weights, module.graph)

    def forward(self, **inputs: Tensor) -> Any:
        """Run the graph node by node; a trace of this is the cast graph."""
        return _CastInterpreter(self).run(*inputs.values())


class _CastInterpreter(fx.Interpreter):
    def __init__(self, policy: _Cast) -> None:
        super().__init__(policy.graph_module)
        self.policy = policy

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        policy, name = self.policy, self.node.name
        if name in policy.islands:
            result = super().call_function(target, *_to(torch.float32, (args, kwargs)))
            return result if name in policy.wide else _to(policy.format, result)
        if target in HALVES:
            count = HALVES[target]
            args = (*_to(policy.format, args[:count]), *args[count:])
        elif target in _PRODUCTS or policy.format in _dtypes((args, kwargs)):
            args, kwargs = _to(policy.format, (args, kwargs))
        return super().call_function(target, args, kwargs)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        formats = [
            self.policy.format if i in self.policy.narrow else torch.float32 for i in range(len(args[0]))
        ]
        given = tuple(_to(format, value) for format, value in zip(formats, args[0], strict=True))
        return super().output(target, (given,), kwargs)


def _to(dtype: torch.dtype, tree: Any) -> Any:
    """Floats that have another format cast to `dtype`, by the one operator that nothing needs to decompose."""

    def cast(tensor: Tensor) -> Tensor:
        other = tensor.is_floating_point() and tensor.itemsize > 1 and tensor.dtype is not dtype  # fp8 stays
        return aten._to_copy.default(tensor, dtype=dtype) if other else tensor

    return tree_map_only(Tensor, cast, tree)


def _dtypes(tree: Any) -> set[torch.dtype]:
    return {leaf.dtype for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)}


def _weight(module: fx.GraphModule, node: fx.Node, half: torch.dtype, islands: set[str]) -> Any:
    """A weight in half, unless fp32 is all that reads it; the sinusoid's constants follow the timestep."""
    value = _attribute(module, str(node.target))
    wide = all(
        user.name in islands or node in user.args[HALVES.get(user.target, len(user.args)) :]
        for user in node.users
    )
    if not isinstance(value, nn.Parameter) or value.dtype is not torch.float32 or wide:
        return value
    return nn.Parameter(value.to(half), requires_grad=False)


def _attribute(module: Any, target: str) -> Any:
    return reduce(getattr, target.split("."), module)
