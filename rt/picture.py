"""A picture that somebody gives, as a file, an image of Pillow or an array: its levels, at the size that is wanted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rt.errors import ConfigError, RtError, printable
from rt.json_file import open_plain

if TYPE_CHECKING:
    from PIL import Image

Float32 = NDArray[np.float32]
Picture = Any
"""A PIL image, an array of (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or the path of a file.

A file is turned upright if it says how. An alpha channel is left out, as diffusers' `load_image` does. Levels are
scaled by the range of their type: bool is 0 or 1, uint8 to 255, uint16 and 16-bit files to 65,535, floats from 0 to 1.
Types that are wider than what they hold (other integers, Pillow's modes I and F) do not say it: their range is the
smallest of 1, 255, 65,535 and the type's that holds the largest level. Nothing is clipped: what is beyond its range, or
NaN, is an error.
"""

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM")
"""What a file may be, as Pillow names it; it knows others whose reading starts a program (EPS)."""
_RANGES = (1, 255, 65535)


def levels(picture: Picture, name: str, size: tuple[int, int], mode: Literal["RGB", "L"]) -> Float32:
    """Levels in [0, 1], (H, W, 3) for "RGB" and (H, W) for "L", resized by Lanczos' filter.

    What has more than 8 bits keeps them where it has that size already. It is resized and made grey in 8 bits, as
    diffusers' `VaeImageProcessor` does with PIL images.

    Args:
        picture: See `Picture`.
        name: Of the argument, for errors.
        size: Width and height in pixels.
        mode: Colours or grey.

    Raises:
        ConfigError: It is no picture, it cannot be read, or it has levels beyond its range.
    """
    try:
        given = _read(picture)
        if isinstance(given, np.ndarray):
            return _of_floats(given, size, mode)
        return _of_image(given, size, mode)
    except _Wrong as error:
        raise ConfigError(f"{name} {_called(picture)}{error}") from None
    except OSError as error:
        raise ConfigError(
            f"{name} {_called(picture)}cannot be read: {printable(str(error.strerror or error))}"
        ) from None
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # Pillow's readers raise what their parsing comes to, SyntaxError and struct.error too
        raise ConfigError(
            f"{name} {_called(picture)}is damaged or of a kind that cannot be read "
            f"({type(error).__name__}: {printable(str(error))}); save it anew, as RGB and without metadata"
        ) from None


class _Wrong(RtError):
    """The end of a sentence that begins with the name of the argument."""


def _called(picture: Picture) -> str:
    return f"{printable(str(picture))} " if isinstance(picture, str | os.PathLike) else ""


def _read(picture: Picture) -> Image.Image | Float32:
    """An image of 8 bits, or floats (H, W, C) in [0, 1] where there are more."""
    from PIL import Image

    if isinstance(picture, str | os.PathLike):
        picture = _open(Path(picture))
    if isinstance(picture, Image.Image):
        if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
            return _scaled(np.asarray(picture)[..., None], wide=True)
        return picture
    array = np.asarray(picture) if hasattr(picture, "__array__") else None
    if array is None or array.dtype.kind not in "buif":
        kind = type(picture).__name__ if array is None else f"{array.dtype} {array.shape}"
        raise _Wrong(
            f"is {kind}: expected a PIL image, an array (height, width, 3) or (height, width), or a path"
        )
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        raise _Wrong(f"is {array.dtype} {array.shape}: expected (height, width, 3) or (height, width)")
    array = array[..., :3]
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array if array.shape[2] == 3 else array[..., 0]))
    return _scaled(array, wide=array.dtype.kind in "iu")


def _open(path: Path) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    Image.init()  # so that it knows all formats of its own
    known = [format for format in FORMATS if format in Image.OPEN]
    with open_plain(path) as file:
        try:
            opened = Image.open(file, formats=known)
        except (UnidentifiedImageError, Image.DecompressionBombError):
            raise _Wrong("is no picture of a usual kind and size: expected PNG, JPEG or WebP") from None
        return ImageOps.exif_transpose(opened)


def _scaled(array: NDArray[Any], *, wide: bool) -> Float32:
    """Levels in [0, 1] of those in the range of their type, or where that is `wide` in the smallest that holds them."""
    low, high = array.min(), array.max()
    is_float = array.dtype.kind == "f"
    largest = 65535 if is_float else np.iinfo(array.dtype).max
    if array.dtype.newbyteorder("=") == np.uint16:
        top = 65535
    elif wide:
        top = next((top for top in (*_RANGES, largest) if high <= top), 0)
        if is_float and 1 < high < 2:  # as a filter leaves it that goes beyond; black if it were of 255
            top = 1
    else:
        top = 1
    if not (np.isfinite(low) and np.isfinite(high) and low >= 0 and high <= top):
        values = "NaN" if np.isnan(low) else f"levels from {low:g} to {high:g}"
        expected = "0 to 1" if is_float else f"0 to {largest}"
        raise _Wrong(f"has {values}, as {array.dtype}: expected {expected}; scale or clip them first")
    scaled: Float32 = (array / np.float64(top)).astype(np.float32)
    return scaled


def _of_image(image: Image.Image, size: tuple[int, int], mode: str) -> Float32:
    if 0 in image.size:
        raise _Wrong("has no pixels")
    # Alpha that is multiplied in is undone first; that of a palette has a mode of its own.
    image = image.convert({"La": "LA", "RGBa": "RGBA", "P": "RGBA"}.get(image.mode, image.mode))
    # Palettes, hues and what lies under alpha cannot be resized as they are.
    flat = image if image.mode in ("L", "RGB") else image.convert("RGB")
    resized = _resized(flat.convert("RGB") if mode == "RGB" else flat, size).convert(mode)
    found: Float32 = np.asarray(resized, np.float32) / np.float32(255)
    return found


def _of_floats(array: Float32, size: tuple[int, int], mode: str) -> Float32:
    if mode == "RGB" and array.shape[1::-1] == size:
        return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
    from PIL import Image

    rounded = np.rint(array * np.float32(255)).astype(np.uint8)
    return _of_image(Image.fromarray(rounded if array.shape[2] == 3 else rounded[..., 0]), size, mode)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
