"""One step program of the U-Net, its buffers seen picture by picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rt.backends import Array, Engine

Float32 = NDArray[np.float32]


class Step:
    """A step with or without guidance, full or shallow.

    A buffer has B rows, or 2B: the unconditional ones of all pictures, then the conditional ones. `sides` below is
    what belongs to one picture's unconditional and conditional row, or to its conditional row alone.

    Attributes:
        latents: (B, C, h, w), to be written.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        inputs = engine.inputs
        self.latents: Array = inputs["latents"]
        self._sided = {
            name: array.reshape(-1, len(self.latents), *array.shape[1:])
            for name, array in inputs.items()
            if name.startswith(("time_", "context_"))
        }
        self._times = [name for name in self._sided if name.startswith("time_")]
        self._contexts = [name for name in self._sided if name.startswith("context_")]
        self._prediction = engine.outputs["prediction"].reshape(-1, *self.latents.shape)

    def clear(self) -> None:
        """Zeros where a row may stay without a picture."""
        self.latents.fill(0.0)
        for name in self._times:
            self._sided[name].fill(0.0)

    def write_context(self, picture: int, sides: Sequence[Mapping[str, Float32]]) -> None:
        """What the text of `picture` gave, for the whole run."""
        for name in self._contexts:
            for rows, values in zip(self._sided[name], sides, strict=True):
                rows[picture] = values[name]

    def write_time(self, picture: int, sides: Sequence[Mapping[str, Float32]]) -> None:
        """What its timestep gave; where both sides share a row, that of the conditional side."""
        for name in self._times:
            buffer = self._sided[name]
            for rows, values in zip(buffer, sides[-len(buffer) :], strict=True):
                rows[picture] = values[name]

    def write_inpainting(self, picture: int, mask: Float32, around: Float32) -> None:
        """Of `picture` and of every row after it."""
        self._engine.inputs["mask"][picture:] = mask
        self._engine.inputs["around"][picture:] = around

    def take_deep(self, full: Step) -> None:
        """In a shallow step: the features (R, …) that the last run of the full one has kept."""
        np.copyto(self._engine.inputs["deep"], full._engine.outputs["deep"])

    def run(self) -> None:
        """Run the program once."""
        self._engine.enqueue()

    def prediction(self, picture: int) -> tuple[Float32, Float32 | None]:
        """Conditional and unconditional output (C, h, w)."""
        both = self._prediction[:, picture]
        return both[-1], both[0] if len(both) == 2 else None
