"""Run a traced program in torch: its outputs are the reference; what half would lose decides the islands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx

from rt.errors import NumericsError
from rt.export.operators import WIDEST_HEAD, ops
from rt.export.program import Program

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default
_NORMS = {aten.group_norm.default, aten.layer_norm.default}
_WITH_PRODUCT = {ops.geglu_linear.default: 3, ops.query_attention.default: 2}
"""Operators that do not show how far a product in them reaches, to how many of their arguments are the product's."""
_EPSILON = 1e-5  # where a norm's arguments leave it out
_AT_ONCE = 1 << 22  # elements of which a handful of copies fit into memory


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What one run in fp32 showed.

    Attributes:
        outputs: Name to value.
        magnitudes: Largest absolute value of each node, inputs and weights included, by node name.
        logits: For each attention node, a bound on its scaled products of query and key: the
            product of the largest norms (Cauchy-Schwarz).
        losses: For each norm, the relative L2 error that it adds in half precision, infinite where it overflows. Other
            operators that are not products add no more than the rounding of their result.
    """

    outputs: Mapping[str, NDArray[np.float32]]
    magnitudes: Mapping[str, float]
    logits: Mapping[str, float]
    losses: Mapping[str, float] = field(default_factory=dict)


def observe(program: Program, half: torch.dtype | None = None) -> Observation:
    """Run `program` on its example inputs; `half` is the format that it will be cast to, if any.

    Raises:
        NumericsError: When a weight or an output has NaN or Inf: no engine could do better.
    """
    recorder = _Recorder(program.module, half)
    with torch.inference_mode():
        for name, weight in program.module.named_parameters():
            if not np.isfinite(_largest(weight)):
                raise NumericsError(
                    f"{program.component.value}: weight {name!r} has NaN or Inf; get the checkpoint again"
                )
        results = recorder.run(*program.inputs.values())
    outputs = {name: value.numpy().copy() for name, value in zip(program.outputs, results, strict=True)}
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            raise NumericsError(
                f"{program.component.value}: output {name!r} is not finite in torch in fp32; the weights are broken"
            )
    return Observation(
        outputs=outputs, magnitudes=recorder.magnitudes, logits=recorder.logits, losses=recorder.losses
    )


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, half: torch.dtype | None) -> None:
        super().__init__(module)
        self.half = half
        self.magnitudes: dict[str, float] = {}
        self.logits: dict[str, float] = {}
        self.losses: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is _ATTENTION:
            (query, key, *_), kwargs = self.fetch_args_kwargs_from_env(n)
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            self.logits[n.name] = _largest(query.norm(dim=-1)) * _largest(key.norm(dim=-1)) * scale
        if n.target in (ops.attention.default, ops.self_attention.default):
            (*operands, heads), _ = self.fetch_args_kwargs_from_env(n)
            query, key, *_ = operands if len(operands) > 1 else operands[0].chunk(3, -1)
            query, key = (x.unflatten(-1, (heads, -1)) for x in (query, key))
            if query.shape[-1] > WIDEST_HEAD:
                bound = _largest(query.norm(dim=-1)) * _largest(key.norm(dim=-1))
                self.logits[n.name] = bound * query.shape[-1] ** -0.5
        if n.target in _NORMS and self.half is not None:
            (x, shape, _, _, *rest), _ = self.fetch_args_kwargs_from_env(n)
            rows = x.reshape(len(x) * shape, -1) if isinstance(shape, int) else x.flatten(-len(shape))
            self.losses[n.name] = norm_loss(rows, rest[0] if rest else _EPSILON, self.half)
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.magnitudes[n.name] = max(_largest(result), self._within(n))
        return result

    def _within(self, n: fx.Node) -> float:
        """The largest value of the product inside an operator that takes a linear layer in."""
        if n.target not in _WITH_PRODUCT:
            return 0.0
        arguments, _ = self.fetch_args_kwargs_from_env(n)
        return _largest(F.linear(*arguments[: _WITH_PRODUCT[n.target]]))


def norm_loss(rows: Tensor, epsilon: float, half: torch.dtype) -> float:
    """What normalizing each of `rows` (N, K) loses where `half` holds everything between two operations.

    That is how an engine without a kernel for norms computes them. Sums are taken in fp32. The input is rounded on both
    sides: it comes that way.

    Returns:
        Relative L2 error; infinite where a square leaves the format.
    """

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(half).float()

    lost = total = 0.0
    rows = rows.reshape(-1, rows.shape[-1])
    for part in torch.split(rows, max(1, _AT_ONCE // rows.shape[-1])):
        part = rounded(part)
        exact = torch.nn.functional.layer_norm(part, part.shape[-1:], eps=epsilon)
        centred = rounded(part - rounded(part.mean(-1, keepdim=True)))
        variance = rounded(rounded(centred * centred).mean(-1, keepdim=True))
        if not variance.isfinite().all():
            return math.inf
        got = rounded(centred * rounded(torch.rsqrt(variance + epsilon)))
        lost += float((got - exact).square().sum())
        total += float(exact.square().sum())
    return math.sqrt(lost / max(total, 1e-30))


def _largest(tensor: Tensor) -> float:
    low, high = torch.aminmax(tensor)  # ten times as fast as the maximum norm, and one pass like it
    return float(torch.maximum(-low, high))
