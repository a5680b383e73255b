"""Number formats by name, and their values in numpy, which knows neither bfloat16 nor 8-bit floats.

Formats that numpy lacks are held as their bits: bfloat16 as uint16, float8 as uint8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rt.errors import ConfigError

Array = NDArray[Any]

_STORAGE: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(np.uint16),
    "float8_e4m3fn": np.dtype(np.uint8),
}
_NATIVE = ("float32", "float16", "float64", "int64", "int32", "uint32", "int8", "uint8", "bool")


def storage(name: str) -> np.dtype[Any]:
    """The numpy format that holds one value of the format `name`.

    Raises:
        ConfigError: There is no such format.
    """
    if name in _STORAGE:
        return _STORAGE[name]
    if name in _NATIVE:
        return np.dtype(name)
    raise ConfigError(
        f"{name!r} is no number format of a device; use one of {', '.join([*_NATIVE, *_STORAGE])}"
    )


def encode(values: Array, name: str) -> Array:
    """`values` in the format `name`, rounded to nearest even; its bits where numpy does not have the format.

    Raises:
        ConfigError: There is no such format, or none that floats can be turned into here (float8).
    """
    if name == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        # Half a unit in the last kept place, less one bit where that place is even. A NaN would become an infinity.
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
    if name in _STORAGE:
        raise ConfigError(
            f"values cannot be turned into {name} on the host; give its bits as {storage(name)}"
        )
    with np.errstate(over="ignore"):  # infinity is what float16 makes of them, here as on a device
        return np.asarray(values).astype(storage(name), copy=False)


def decode(stored: Array, name: str) -> Array:
    """What `encode` gave as numpy values: float32 for bfloat16, as they are otherwise."""
    if name == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if name in _STORAGE:
        raise ConfigError(
            f"{name} cannot be turned into values on the host; read its bits as {storage(name)}"
        )
    return stored
