"""Tells what a picture shows, without a network.

At the place that the caption names, the picture's pixels are compared with the font's glyphs of all concepts, moved by
up to a tenth of the picture, on the background that the picture has; the nearest in mean squared error is what it
shows. The background is the colour of the palette nearest to the median of the picture's border.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from render import Renderer
from world import COLOURS, Emoji, Placed, Scene, draw

GRID = 32
"""Pictures are compared at this side: finer than the eye's first look, and coarse enough to be quick."""
SHIFT = 3
"""How far a glyph may stand aside, in pixels of that side: a scene's own step is two."""
MARGIN = 0.1
"""Around a glyph's box, in parts of the picture: what is compared."""


@dataclass(frozen=True)
class Verdict:
    """What a picture of `scene` shows: the nearest emoji at each of its places, and the nearest background.

    `distance` is how far the picture is from the glyphs that were found, in mean squared levels of 255.
    """

    scene: Scene
    picture: np.ndarray
    found: tuple[Emoji, ...]
    colour: str
    distance: float

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
    """Finds emoji by their pixels, in pictures of the renderer's size, a multiple of `GRID`."""

    def __init__(self, emoji: tuple[Emoji, ...], renderer: Renderer):
        self._emoji, self._size, self._renderer = emoji, renderer.size, renderer
        self._pixel = renderer.size // GRID
        self._templates = lru_cache(maxsize=None)(self._make_templates)

    def __call__(self, scene: Scene, picture: np.ndarray) -> Verdict:
        """Judge a picture, uint8 [H, W, 3]."""
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        background = np.median(border, axis=0)
        distances = {name: np.square(np.subtract(rgb, background)).sum() for name, rgb in COLOURS.items()}
        nearest = [self._nearest(picture, placed, background) for placed in scene.placed]
        found, errors = zip(*nearest, strict=True)
        return Verdict(scene, picture, found, min(distances, key=distances.__getitem__), max(errors))

    def _nearest(self, picture: np.ndarray, placed: Placed, background: np.ndarray) -> tuple[Emoji, float]:
        rows, columns = self._box(placed)
        seen = _reduced(picture[rows, columns].astype(np.float32), self._pixel)
        alpha, premultiplied, owner = self._templates(placed.centre, placed.side)
        expected = premultiplied + (1 - alpha) * background.astype(np.float32)
        errors = np.square(expected - seen).mean(axis=(1, 2, 3))
        return self._emoji[owner[errors.argmin()]], float(errors.min())

    def _box(self, placed: Placed) -> tuple[slice, slice]:
        reach = placed.side / 2 + MARGIN
        edges = [
            [round(np.clip(centre + sign * reach, 0, 1) * GRID) * self._pixel for sign in (-1, 1)]
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
            for shift in itertools.product(range(-SHIFT, SHIFT + 1), repeat=2):
                layer = Image.new("RGBA", (self._size, self._size))
                x, y = (
                    round(c * self._size - extent / 2) + by * self._pixel
                    for c, extent, by in zip(centre, glyph.size, shift, strict=True)
                )
                layer.paste(glyph, (x, y))
                pixels = np.asarray(layer, np.float32)[rows, columns]
                alpha = pixels[..., 3:] / 255
                alphas.append(_reduced(alpha, self._pixel))
                colours.append(_reduced(pixels[..., :3] * alpha, self._pixel))
                owner.append(index)
        return np.stack(alphas), np.stack(colours), np.array(owner)


def distance(verdicts: list[Verdict]) -> float:
    """How far pictures are from the font's glyphs, root mean square in levels of 255."""
    return round(float(np.sqrt(np.mean([verdict.distance for verdict in verdicts]))), 2)


def _reduced(pixels: np.ndarray, by: int) -> np.ndarray:
    height, width, channels = pixels.shape
    return pixels.reshape(height // by, by, width // by, by, channels).mean(axis=(1, 3))


def held_out(rng: np.random.Generator, emoji: tuple[Emoji, ...], count: int, pairs: bool) -> list[Scene]:
    """So many different scenes that training never saw, of one emoji or of two."""
    scenes: dict[str, Scene] = {}
    for _ in range(100 * count):
        scene = draw(rng, emoji, held_out=True)
        if (len(scene.emoji) == 2) == pairs:
            scenes[scene.caption] = scene
        if len(scenes) == count:
            return list(scenes.values())
    raise SystemExit(
        f"error: {len(emoji)} emoji have no {count} held-out {'pairs' if pairs else 'singles'}: ask for fewer"
    )
