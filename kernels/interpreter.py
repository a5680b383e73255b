"""What Triton 3.9's interpreter gets wrong, put right: it multiplies bfloat16 matrices as if they were 16-bit integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair() -> None:
    """From here on `tl.dot` of bfloat16 sums exact products in fp32, as a GPU does."""
    dot = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def _widened(tile: Any) -> Any:
    """A bfloat16 tile, whose bits the interpreter keeps as uint16, in fp32; any other as it is."""
    if tile.dtype.scalar != tl.bfloat16:
        return tile
    return TensorHandle((tile.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
