"""Static shapes: what an engine is built for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rt.errors import ShapeError, shown

MOST_AT_ONCE = 1024
"""Pictures of a batch."""
MOST_PIXELS = 2**28
"""Of a batch: one picture of 16,384 x 16,384, 256 of 1,024 x 1,024."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """An input or output of an engine: its name, its shape and its numpy dtype name."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True, order=True)
class ShapeProfile:
    """Sizes of one build: pictures at once, and their height and width in pixels."""

    height: int
    width: int
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("height", "width", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ShapeError(f"{name} is {shown(value)}; it must be a whole number of at least 1")
        if self.batch_size > MOST_AT_ONCE:
            raise ShapeError(f"batch_size is {shown(self.batch_size)}; it must be at most {MOST_AT_ONCE}")
        if self.batch_size * self.height * self.width > MOST_PIXELS:
            raise ShapeError(
                f"height {shown(self.height)} and width {shown(self.width)} for {self.batch_size} pictures at once "
                f"are too large; a batch has at most {MOST_PIXELS:,} pixels"
            )

    def __str__(self) -> str:
        return f"{self.batch_size} x {self.height} x {self.width}"

    def check_multiple(self, factor: int) -> ShapeProfile:
        """Itself, when both sides are multiples of the autoencoder's factor.

        Raises:
            ShapeError: With the nearest sizes that would do.
        """
        for name, value in (("height", self.height), ("width", self.width)):
            if value % factor:
                below = max(value // factor * factor, factor)
                raise ShapeError(
                    f"{name} {value} is not a multiple of {factor}, the scale of this model's autoencoder; "
                    f"use {below} or {value // factor * factor + factor}"
                )
        return self


def choose_size(profiles: Iterable[ShapeProfile], height: int | None, width: int | None) -> tuple[int, int]:
    """The built size that matches; a side left out matches any, the first size built wins.

    Raises:
        ShapeError: When no profile has that size, with those that are there.
    """
    sizes = list(dict.fromkeys((p.height, p.width) for p in profiles))
    for built in sizes:
        if height in (None, built[0]) and width in (None, built[1]):
            return built
    asked = f"{height if height is not None else 'any'} x {width if width is not None else 'any'}"
    listed = ", ".join(f"{h} x {w}" for h, w in sizes)
    raise ShapeError(
        f"size {asked} (height x width) is not in this bundle, which was built for {listed}; "
        f"use one of these or rebuild with --height and --width"
    )


def split_batch(count: int, batch_sizes: Iterable[int]) -> list[int]:
    """Batch sizes that cover `count` pictures: as many large full ones as fit, then the smallest for the rest.

    >>> split_batch(7, [1, 4])
    [4, 1, 1, 1]
    >>> split_batch(3, [2, 4])
    [2, 2]
    """
    sizes = sorted(set(batch_sizes), reverse=True)
    batches = []
    while count > 0:
        batches.append(next((size for size in sizes if size <= count), sizes[-1]))
        count -= batches[-1]
    return batches
