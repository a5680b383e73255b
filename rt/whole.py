"""What counts as a whole number where somebody gives one."""

from __future__ import annotations

from numbers import Integral
from typing import TypeGuard


def is_whole(value: object) -> TypeGuard[int]:
    """Python's and NumPy's integers; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)
