"""A fused graph as TensorRT reads it: operators with a kernel of ours become plugin nodes, others stay functions.

A plugin node has the kernel's name as its type, which no standard operator has; the parser finds the plugin by it, by
its namespace and by version "1". Functions in the file are expanded by the parser.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rt.errors import BuildError
from rt.export.operators import DOMAIN
from rt.export.tensorrt.operators import OPERATORS, FusedOperator
from rt.kernels.spec import Case

HALVES = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class FusedNode:
    """A node `rt::…` that a kernel of ours could compute.

    Attributes:
        node: In its graph.
        operator: Which one.
        case: The kernel's.
        attributes: Of the node.
    """

    node: ir.Node
    operator: FusedOperator
    case: Case
    attributes: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Operator and shape, such as `attention float16 batch=2 queries=4096 …`: what is tuned once."""
        return f"{self.operator.kernel} {self.case}"


def fused_nodes(model: ir.Model) -> Iterator[FusedNode]:
    """Those in half precision; kernels of ours do not pay in fp32."""
    for node in model.graph:
        operator = OPERATORS.get(node.op_type) if node.domain == DOMAIN else None
        if operator is None:
            continue
        first = node.inputs[0]
        if first is None or first.dtype not in HALVES:
            continue
        attributes = {name: kind(node.attributes[name].value) for name, kind in operator.attributes.items()}
        shapes = [_shape(value) for value in node.inputs]
        case = operator.case(shapes, attributes, HALVES[first.dtype])
        yield FusedNode(node=node, operator=operator, case=case, attributes=attributes)


@contextmanager
def with_plugins(fused: Path, native: Collection[str] = ()) -> Iterator[Path]:
    """The graph with plugin nodes, as a file beside `fused` while the block runs; weights are shared.

    Args:
        fused: A graph with nodes `rt::…`.
        native: Keys of nodes (`FusedNode.key`) that stay functions of standard operators.
    """
    model = ir.load(fused)
    for found in list(fused_nodes(model)):
        if found.key not in native:
            _to_plugin(model, found)
    used = {node.op_identifier() for node in model.graph}
    for identifier in set(model.functions) - used:
        del model.functions[identifier]
    path = fused.with_name(f".{fused.stem}.plugins.onnx")
    try:
        ir.save(model, path)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _to_plugin(model: ir.Model, found: FusedNode) -> None:
    operator, node = found.operator, found.node
    inputs = list(node.inputs)
    for position, names in operator.zeros:
        inputs.insert(position, _zeros(model, tuple(found.case.sizes[name] for name in names)))
    plugin = ir.Node(
        DOMAIN,
        operator.kernel,
        inputs,
        [
            *(
                ir.AttrInt64(name, value)
                for name, value in found.attributes.items()
                if isinstance(value, int)
            ),
            *(
                ir.AttrFloat32(name, value)
                for name, value in found.attributes.items()
                if isinstance(value, float)
            ),
            ir.AttrString("plugin_namespace", DOMAIN),
            ir.AttrString("plugin_version", "1"),
        ],
        outputs=[ir.Value(name=None, shape=node.outputs[0].shape, type=node.outputs[0].type)],
        name=node.name,
    )
    old, new = node.outputs[0], plugin.outputs[0]
    new.name = old.name
    model.graph.insert_before(node, plugin)
    ir.convenience.replace_all_uses_with(old, new)
    for index, output in enumerate(model.graph.outputs):
        if output is old:
            model.graph.outputs[index] = new
    model.graph.remove(node, safe=True)


def _zeros(model: ir.Model, shape: tuple[int, ...]) -> ir.Value:
    name = f"zeros_{'x'.join(map(str, shape))}"
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.zeros(shape, np.float32), name=name)
        model.graph.initializers[name] = ir.Value(
            name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    return model.graph.initializers[name]


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    sizes = None if value is None or value.shape is None else value.shape.dims
    if sizes is None or not all(isinstance(size, int) for size in sizes):
        raise BuildError(f"{value} has no static shape in the fused graph, which plugins are compiled for")
    return tuple(int(size) for size in sizes)  # type: ignore[arg-type]
