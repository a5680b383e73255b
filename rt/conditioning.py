"""What steers a picture: the text, and what the U-Net makes of it once a prompt instead of once a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rt.backends import Engine
from rt.errors import NumericsError

Float32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioning:
    """What the text encoders made of one prompt: states (T, D), and pooled (P,) for SDXL."""

    states: Float32
    pooled: Float32 | None = None

    def zeros(self) -> Conditioning:
        """As large and all zero: what no negative prompt means to SDXL."""
        pooled = None if self.pooled is None else np.zeros_like(self.pooled)
        return Conditioning(states=np.zeros_like(self.states), pooled=pooled)


def contexts(
    engine: Engine, conditionings: set[Conditioning]
) -> Mapping[Conditioning, Mapping[str, Float32]]:
    """The keys and values of every cross-attention for each text, `context_0` … without a dimension of rows.

    Args:
        engine: Of `Component.UNET_CONTEXT`, which takes one text at a time.
        conditionings: Each once.

    Raises:
        NumericsError: When it gives NaN or Inf.
    """
    made = {}
    for conditioning in conditionings:
        np.copyto(engine.inputs["context"][0], conditioning.states)
        engine.enqueue()
        made[conditioning] = {name: output[0].copy() for name, output in engine.outputs.items()}
        if not all(np.isfinite(value).all() for value in made[conditioning].values()):
            raise NumericsError(
                "unet_context gave NaN or Inf; build with --dtype fp32 or --bf16, or check the weights with rt verify"
            )
    return made
