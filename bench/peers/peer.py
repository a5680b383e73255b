"""What a peer does: the parts of a model and a whole picture, on arrays that it is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

TEXT, UNET, VAE, PICTURE, STEP = "text", "unet", "vae", "picture", "step"
MEASURES: Mapping[str, str] = {
    TEXT: "text encoder",
    UNET: "U-Net",
    VAE: "VAE decoder",
    PICTURE: "picture",
    STEP: "step of the loop",
}
"""What is timed, each with what it is called. `STEP` is taken inside `PICTURE`; the others are methods of a peer."""

GUIDANCE_SCALE = 7.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """The same for all peers in one round.

    Attributes:
        tokens: int64 (1, T).
        latents: (1, C, h, w), as the U-Net has them.
        timestep: A whole number.
        context: (2, T, D), the unconditional row first.
        noise: (1, C, h, w), to begin a picture with.
        prompt: Of the picture.
        steps: Of DDIM with the checkpoint's noise schedule, for the picture.
    """

    tokens: NDArray[np.int64]
    latents: Float32
    timestep: int
    context: Float32
    noise: Float32
    prompt: str
    steps: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What one call gave: its output, None where a library rounds it to bytes, and the seconds of what it timed."""

    output: Float32 | None
    seconds: Mapping[str, float]


class Peer(Protocol):
    """A loaded model. A method that is missing is not measured, as where a library hides the part."""

    def text(self, inputs: Inputs) -> Outcome:
        """Tokens → states (1, T, D)."""

    def unet(self, inputs: Inputs) -> Outcome:
        """One guided evaluation → what it predicts for the conditional row, (C, h, w)."""

    def vae(self, inputs: Inputs) -> Outcome:
        """Latents → image (H, W, 3), in [-1, 1] up to overshoot."""

    def picture(self, inputs: Inputs) -> Outcome:
        """Prompt and noise → image (H, W, 3) in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a peer is loaded with.

    Attributes:
        checkpoint: A diffusers folder with float32 weights.
        work: For what is made from it once: graphs in other formats.
        threads: Processors to use.
        options: The candidate's own.
    """

    checkpoint: Path
    work: Path
    threads: int
    options: Mapping[str, Any] = field(default_factory=dict)


def timed(measure: str, call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `call` returns, and its seconds under the name of `measure`."""
    started = time.perf_counter()
    result = call()
    return result, {measure: time.perf_counter() - started}
