"""How an operator `rt::…` of a graph is a kernel: shapes and attributes of one, sizes and constants of the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rt.kernel_image import Constant
from rt.kernels.spec import Case

Sizes = Mapping[str, Any]
"""By name: integers, or symbolic numbers with the same operators."""


@dataclass(frozen=True, kw_only=True)
class FusedOperator:
    """One operator.

    Attributes:
        node: Its ONNX type in the domain `rt`.
        kernel: The `KernelSpec`, and the plugin.
        attributes: Of the node, with their types.
        sizes: (shapes of the node's tensors, its attributes) → sizes of the kernel.
        constants: Attributes of the node → attributes of the kernel's case.
        zeros: Inputs of the kernel that the node does not have: position to the sizes of an fp32 array of zeros.
    """

    node: str
    kernel: str
    attributes: Mapping[str, type]
    sizes: Callable[[Sequence[Sequence[Any]], Mapping[str, Any]], dict[str, Any]]
    constants: Callable[[Mapping[str, Any]], dict[str, Constant]]
    zeros: tuple[tuple[int, tuple[str, ...]], ...] = ()

    def case(self, shapes: Sequence[Sequence[int]], attributes: Mapping[str, Any], dtype: str) -> Case:
        """What the kernel is compiled for."""
        sizes = self.sizes(shapes, attributes)
        return Case(sizes=sizes, dtype=dtype, attributes=self.constants(attributes))


def _product(factors: Sequence[Any]) -> Any:
    result, *rest = factors
    for factor in rest:
        result = result * factor
    return result


def _attention(shapes: Sequence[Sequence[Any]], attributes: Mapping[str, Any]) -> dict[str, Any]:
    query, key, *_ = shapes
    return {
        "batch": query[0],
        "queries": query[1],
        "keys": key[1],
        "width": query[2] // attributes["heads"],
    }


def _group_norm(shapes: Sequence[Sequence[Any]], attributes: Mapping[str, Any]) -> dict[str, Any]:
    batch, *pixels, channels = shapes[0]
    return {"batch": batch, "pixels": _product(pixels), "channels": channels}


def _geglu(shapes: Sequence[Sequence[Any]], attributes: Mapping[str, Any]) -> dict[str, Any]:
    *rows, features = shapes[0]
    return {"rows": _product(rows), "features": features // 2}


OPERATORS: Mapping[str, FusedOperator] = {
    operator.node: operator
    for operator in (
        FusedOperator(
            node="Attention",
            kernel="attention",
            attributes={"heads": int},
            sizes=_attention,
            constants=lambda attributes: {"heads": attributes["heads"]},
        ),
        FusedOperator(
            node="GroupNorm",
            kernel="group_norm",
            attributes={"groups": int, "epsilon": float, "silu": int},
            sizes=_group_norm,
            constants=lambda attributes: {
                "groups": attributes["groups"],
                "eps": attributes["epsilon"],
                "silu": bool(attributes["silu"]),
            },
            zeros=((1, ("batch", "channels")),),  # what is added before the norm
        ),
        FusedOperator(
            node="Geglu", kernel="geglu", attributes={}, sizes=_geglu, constants=lambda attributes: {}
        ),
    )
}
"""By the type of the node. `rt::Convolution` has no kernel for a GPU: TensorRT's own are hard to beat."""
