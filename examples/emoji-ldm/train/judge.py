"""Tells what a picture shows, without a network.

At the place that the caption names, the picture's pixels are compared with the font's glyphs of all concepts, moved by
up to 6 pixels, on the background that the picture has; the nearest in mean squared error is what it shows. The
background is the colour of the palette nearest to the median of the picture's border.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from render import Renderer
from world import COLOURS, Emoji, Placed, Scene, draw

SHIFT_PX = 6
MARGIN = 0.1
"""Around a glyph's box, in parts of the picture: what is compared."""


@dataclass(frozen=True)
class Verdict:
    """What a picture of `scene` shows: the nearest emoji at each of its places, and the nearest background."""

    scene: Scene
    picture: np.ndarray
    found: tuple[Emoji, ...]
    colour: str

    @property
    def concepts_right(self) -> bool:
        """Whether every emoji of the caption is the nearest at its place."""
        return self.found == self.scene.emoji

    @property
    def right(self) -> bool:
        """Whether nothing is wrong."""
        return self.concepts_right and self.colour == self.scene.colour

    def __str__(self) -> str:
        """The caption, and where something is wrong what was found instead."""
        if self.right:
            return self.scene.caption
        return f"{self.scene.caption} [{', '.join(emoji.name for emoji in self.found)}; {self.colour}]"


class Judge:
    """Finds emoji in pictures of one size by their pixels."""

    def __init__(self, emoji: tuple[Emoji, ...], size: int):
        self._emoji, self._size, self._renderer = emoji, size, Renderer(size)
        self._templates = lru_cache(maxsize=None)(self._make_templates)

    def __call__(self, scene: Scene, picture: np.ndarray) -> Verdict:
        """Judge a picture, uint8 [H, W, 3]."""
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        background = np.median(border, axis=0)
        distances = {name: np.square(np.subtract(rgb, background)).sum() for name, rgb in COLOURS.items()}
        found = tuple(self._nearest(picture, placed, background) for placed in scene.placed)
        return Verdict(scene, picture, found, min(distances, key=distances.__getitem__))

    def _nearest(self, picture: np.ndarray, placed: Placed, background: np.ndarray) -> Emoji:
        rows, columns = self._box(placed)
        seen = _halved(picture[rows, columns].astype(np.float32))
        alpha, premultiplied, owner = self._templates(placed.centre, placed.side)
        expected = premultiplied + (1 - alpha) * background.astype(np.float32)
        errors = np.square(expected - seen).mean(axis=(1, 2, 3))
        return self._emoji[owner[errors.argmin()]]

    def _box(self, placed: Placed) -> tuple[slice, slice]:
        reach = placed.side / 2 + MARGIN
        edges = [
            [round(np.clip(centre + sign * reach, 0, 1) * self._size / 2) * 2 for sign in (-1, 1)]
            for centre in placed.centre
        ]
        return slice(*edges[1]), slice(*edges[0])

    def _make_templates(
        self, centre: tuple[float, float], side: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of all emoji and shifts: alpha [N, h, w, 1], colour times alpha [N, h, w, 3], which emoji [N]."""
        rows, columns = self._box(Placed(self._emoji[0], centre, side))
        alphas, colours, owner = [], [], []
        for index, emoji in enumerate(self._emoji):
            glyph = self._renderer.glyph(emoji, round(side * self._size))
            for shift in itertools.product(range(-SHIFT_PX, SHIFT_PX + 1, 2), repeat=2):
                layer = Image.new("RGBA", (self._size, self._size))
                x, y = (
                    round(c * self._size - extent / 2) + by
                    for c, extent, by in zip(centre, glyph.size, shift, strict=True)
                )
                layer.paste(glyph, (x, y))
                pixels = np.asarray(layer, np.float32)[rows, columns]
                alpha = pixels[..., 3:] / 255
                alphas.append(_halved(alpha))
                colours.append(_halved(pixels[..., :3] * alpha))
                owner.append(index)
        return np.stack(alphas), np.stack(colours), np.array(owner)


def _halved(pixels: np.ndarray) -> np.ndarray:
    height, width, channels = pixels.shape
    return pixels.reshape(height // 2, 2, width // 2, 2, channels).mean(axis=(1, 3))


def held_out(rng: np.random.Generator, emoji: tuple[Emoji, ...], count: int, pairs: bool) -> list[Scene]:
    """Different scenes that training never saw, of one emoji or of two."""
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        scene = draw(rng, emoji, held_out=True)
        if (len(scene.emoji) == 2) == pairs:
            scenes[scene.caption] = scene
    return list(scenes.values())
