"""Triton's interpreter, put right: it keeps bf16 as bits, and its `tl.dot` multiplies those as integers."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

_create_dot = InterpreterBuilder.create_dot


def _widened_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
    a, b = (builder.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _create_dot(builder, a, b, *rest)


def widen_products() -> None:
    """Products of bf16 in fp32, which holds them exactly, for all kernels interpreted from now on."""
    InterpreterBuilder.create_dot = _widened_dot
