"""Scenes as pixels: the font's own bitmaps, scaled and set on a plain background."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from world import CELLS, COLOURS, Emoji, Scene

FONTS = (
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf"),
)
STRIKE = 109
"""The only size the bitmap font has, in pixels; its cells are 136 x 128."""


class Renderer:
    """Draws scenes at one picture size.

    Args:
        size: height and width of the pictures in pixels.
        font: the file of Noto Color Emoji; if empty, wherever Linux distributions put it.
    """

    def __init__(self, size: int, font: str = ""):
        path = Path(font) if font else next(filter(Path.exists, FONTS), FONTS[0])
        if not path.exists():
            raise SystemExit(
                f"error: Noto Color Emoji was not found at {path}: "
                "install the package fonts-noto-color-emoji, or name the file with --font"
            )
        self.size = size
        self._font = ImageFont.truetype(str(path), STRIKE)
        self.glyph = lru_cache(maxsize=None)(self._glyph)

    def _glyph(self, emoji: Emoji, side: int) -> Image.Image:
        """The glyph without its margins, RGBA, its longer side of `side` pixels."""
        cell = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(cell).text(
            (80, 80), emoji.character, font=self._font, embedded_color=True, anchor="mm"
        )
        box = cell.getbbox()
        if box is None:
            raise SystemExit(
                f"error: the font has no glyph for {emoji.name} (U+{ord(emoji.character[0]):04X})"
            )
        # Premultiplied while it shrinks, so that transparent black does not darken the edges.
        glyph = cell.crop(box).convert("RGBa")
        scale = side / max(glyph.size)
        small = [max(1, round(extent * scale)) for extent in glyph.size]
        return glyph.resize(small, Image.Resampling.LANCZOS).convert("RGBA")

    def __call__(self, scene: Scene, rng: np.random.Generator | None = None) -> np.ndarray:
        """The picture, uint8 [height, width, 3]; with `rng`, all of it may stand a cell of the grid aside.

        That is up or down, and left or right for what stands one above the other.
        """
        step = int(rng.integers(-1, 2)) if rng else 0
        aside = (step, 0) if scene.place in ("above", "below") else (0, step)
        canvas = Image.new("RGB", (self.size, self.size), COLOURS[scene.colour])
        for placed in scene.placed:
            glyph = self.glyph(placed.emoji, round(placed.side * self.size))
            x, y = (
                self._place(centre, extent, cells)
                for centre, extent, cells in zip(placed.centre, glyph.size, aside, strict=True)
            )
            canvas.paste(glyph, (x, y), glyph)
        return np.asarray(canvas)

    def _place(self, centre: float, extent: int, cells: int) -> int:
        """The first pixel of a glyph, moved by so many cells, or not at all where it would be cut off."""
        first = round(centre * self.size - extent / 2)
        moved = first + cells * self.size // CELLS
        return moved if 0 <= moved <= self.size - extent else first


def pixel_art(picture: np.ndarray, blocks: int = 16) -> np.ndarray:
    """The picture in `blocks` x `blocks` squares of one colour: the style that the LoRA learns."""
    size = picture.shape[0] // blocks
    small = picture.reshape(blocks, size, blocks, size, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    return small.repeat(size, axis=0).repeat(size, axis=1)


def grid(pictures: list[np.ndarray], columns: int, scale: int = 2, gap: int = 4) -> Image.Image:
    """Pictures of one size, row by row on white, enlarged without smoothing."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, picture in enumerate(pictures):
        at = gap + (i % columns) * (width + gap), gap + (i // columns) * (height + gap)
        sheet.paste(Image.fromarray(picture), at)
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
