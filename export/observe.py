"""Run a traced program in torch: its outputs are the reference, its magnitudes decide the fp32 islands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from rt.errors import NumericsError
from rt.export.program import Program

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What one run in fp32 showed.

    Attributes:
        outputs: Name to value.
        magnitudes: Largest absolute value of each node, inputs and weights included, by node name.
        logits: For each attention node, a bound on its scaled products of query and key: the
            product of the largest norms (Cauchy-Schwarz).
    """

    outputs: Mapping[str, NDArray[np.float32]]
    magnitudes: Mapping[str, float]
    logits: Mapping[str, float]


def observe(program: Program) -> Observation:
    """Run `program` on its example inputs.

    Raises:
        NumericsError: When a weight or an output has NaN or Inf: no engine could do better.
    """
    recorder = _Recorder(program.module)
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
    return Observation(outputs=outputs, magnitudes=recorder.magnitudes, logits=recorder.logits)


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.magnitudes: dict[str, float] = {}
        self.logits: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is _ATTENTION:
            (query, key, *_), kwargs = self.fetch_args_kwargs_from_env(n)
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            self.logits[n.name] = _largest(query.norm(dim=-1)) * _largest(key.norm(dim=-1)) * scale
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.magnitudes[n.name] = _largest(result)
        return result


def _largest(tensor: Tensor) -> float:
    low, high = torch.aminmax(tensor)  # ten times as fast as the maximum norm, and one pass like it
    return float(torch.maximum(-low, high))
