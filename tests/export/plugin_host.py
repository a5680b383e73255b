"""Run in a process of its own: TensorRT's real plugin module without a GPU, its callbacks at concrete shapes.

The bindings need libnvinfer, which is on no public index. The lean runtime is, has the same plugin registry, and stands
in for it (see `test_tensorrt_plugins.py`). Shapes become numbers by an expression builder that computes at once.

Reads from argv a JSON list of [plugin, capability, [[shape, dtype] ...], attributes]; prints a JSON list of what
TensorRT would put into a plan, or {"error": text}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import tensorrt_bindings

# What the package `tensorrt` does, which is made of this and of libnvinfer.
sys.modules["tensorrt"] = tensorrt_bindings
import tensorrt as trt  # noqa: E402
import tensorrt_bindings.plugin  # noqa: E402

sys.modules["tensorrt.plugin"] = tensorrt_bindings.plugin
from tensorrt_bindings.plugin import _lib, _tensor  # noqa: E402

from rt.errors import RtError  # noqa: E402
from rt.export.tensorrt.plugins import TACTIC, register  # noqa: E402

OPERATION = trt.DimensionOperation
COMPUTE = {
    OPERATION.SUM: lambda a, b: a + b,
    OPERATION.SUB: lambda a, b: a - b,
    OPERATION.PROD: lambda a, b: a * b,
    OPERATION.FLOOR_DIV: lambda a, b: a // b,
    OPERATION.CEIL_DIV: lambda a, b: -(-a // b),
    OPERATION.MAX: max,
    OPERATION.MIN: min,
}


class Number(trt.IDimensionExpr):  # type: ignore[misc]
    """A dimension that is known."""

    value: int

    @classmethod
    def of(cls, value: int) -> Number:
        made = cls.__new__(cls)  # the base can be made by TensorRT alone
        made.value = int(value)
        return made


class Numbers:
    """Its `IExprBuilder`."""

    constant = staticmethod(Number.of)

    @staticmethod
    def operation(op: Any, first: Number, second: Number) -> Number:
        return Number.of(COMPUTE[op](first.value, second.value))


def tensor(shape: list[int], dtype: str) -> Any:
    sizes = _tensor.ShapeExprs(len(shape))
    for axis, size in enumerate(shape):
        sizes[axis] = _tensor.ShapeExpr(Number.of(size))
    return _tensor.TensorDesc(sizes, getattr(trt.DataType, dtype))


def payload(name: str, capability: int, tensors: list[Any], attributes: dict[str, Any]) -> dict[str, Any]:
    """In the order in which TensorRT calls."""
    register(capability)
    plugin = _lib.QDP_REGISTRY[f"rt::{name}"]
    inputs = [tensor(*given) for given in tensors]
    output = plugin.register_func(*inputs, **attributes)
    for made, (shape, _) in zip(inputs, tensors, strict=True):
        made.shape = _tensor.Shape(tuple(shape))
    given = list(attributes.values())
    [combination] = plugin.autotune_func(*inputs, *given, (output,))
    symbol, code, launch, scalars = plugin.aot_impl_func(*inputs, *given, (output,), TACTIC)
    return {
        "registered": trt.get_plugin_registry().get_creator(name, "1", "rt") is not None,
        "attributes": plugin.aot_impl_attr_names,
        "output": [[size._expr.value for size in output.shape_expr], output.dtype.name],
        "formats": [
            [[kind.name for kind in each.types], {layout.name for layout in each.layouts} == {"LINEAR"}]
            for each in combination._get_combinations()
        ],
        "symbol": symbol,
        "code": code,
        "launch": {
            key: getattr(launch, key)._expr.value
            for key in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
        },
        "scalars": [scalar._expr.value for scalar in scalars],
    }


def main() -> None:
    results = []
    _tensor.SymIntExpr._exprBuilder = Numbers()
    for name, capability, tensors, attributes in json.loads(sys.argv[1]):
        try:
            results.append(payload(name, capability, tensors, attributes))
        except RtError as error:
            results.append({"error": str(error)})
    _tensor.SymIntExpr._exprBuilder = None
    print(json.dumps(results))


main()
