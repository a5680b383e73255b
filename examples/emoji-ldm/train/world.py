"""What there is to draw and how one says it: emoji, backgrounds, places, captions, and what is kept from training.

A caption fixes its picture up to a small step aside, so that a learner who has the words has nearly the picture. Which
combinations are held out is a property of their words alone: every machine and every run agrees on it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (24, 24, 28),
    "grey": (150, 152, 158),
    "red": (214, 48, 49),
    "orange": (245, 140, 40),
    "yellow": (250, 220, 90),
    "green": (70, 165, 85),
    "blue": (66, 130, 235),
    "purple": (130, 80, 190),
    "pink": (248, 165, 195),
}
"""sRGB of every background."""

CORNERS = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
RELATIONS = {
    "and": ((0.25, 0.5), (0.75, 0.5)),
    "left of": ((0.25, 0.5), (0.75, 0.5)),
    "right of": ((0.75, 0.5), (0.25, 0.5)),
    "above": ((0.5, 0.25), (0.5, 0.75)),
    "below": ((0.5, 0.75), (0.5, 0.25)),
}
"""Where the first and the second of a pair stand: centres (x, y) in parts of the picture, y downwards."""

LARGE, SMALL = 0.74, 0.44
"""Sides of a glyph that stands alone and of one in a corner or a pair, in parts of the picture."""

CELLS = 16
"""Emoji stand on a grid of so many cells a side. It is the latents': a glyph is the same wherever it is put."""

CONTEXT = 16
"""Places of the text encoder; the longest caption has 13 words."""


@dataclass(frozen=True)
class Emoji:
    """Something to draw."""

    character: str
    name: str
    """With its article, as a caption says it: ``a red heart``."""


@dataclass(frozen=True)
class Placed:
    """An emoji, its centre (x, y) and its longer side in parts of the picture."""

    emoji: Emoji
    centre: tuple[float, float]
    side: float


@dataclass(frozen=True)
class Scene:
    """One or two emoji on a plain background. ``place`` is a key of `CORNERS` or `RELATIONS`, or empty."""

    emoji: tuple[Emoji, ...]
    colour: str = "white"
    place: str = ""

    @property
    def caption(self) -> str:
        """What the model is told."""
        first = self.emoji[0].name
        if len(self.emoji) == 2:
            words = f"{first} {self.place} {self.emoji[1].name}"
        elif self.place:
            words = f"{first} at the {self.place}"
        else:
            words = first
        return words if self.colour == "white" else f"{words} on {_article(self.colour)} background"

    @property
    def placed(self) -> tuple[Placed, ...]:
        """Where everything stands."""
        if len(self.emoji) == 2:
            return tuple(
                Placed(emoji, centre, SMALL)
                for emoji, centre in zip(self.emoji, RELATIONS[self.place], strict=True)
            )
        if self.place:
            return (Placed(self.emoji[0], CORNERS[self.place], SMALL),)
        return (Placed(self.emoji[0], (0.5, 0.5), LARGE),)

    @property
    def held_out(self) -> bool:
        """Whether training never sees this scene: one of its combinations is reserved for `evaluate.py`."""
        names = sorted(emoji.name for emoji in self.emoji)
        if len(names) == 2 and _reserved("pair", *names):
            return True
        return any(
            (self.colour != "white" and _reserved("colour", name, self.colour))
            or (self.place in CORNERS and _reserved("corner", name, self.place))
            for name in names
        )


def _reserved(*words: str) -> bool:
    """One combination in five, chosen by a checksum of its words."""
    return zlib.crc32("/".join(words).encode()) % 5 == 0


def _article(colour: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour}"


def load(count: int) -> tuple[Emoji, ...]:
    """The first `count` emoji of ``emoji.tsv``, which lists the most distinct first."""
    lines = (Path(__file__).parent / "emoji.tsv").read_text(encoding="utf-8").splitlines()
    if not 2 <= count <= len(lines):
        raise SystemExit(f"error: {count} emoji were asked for, and emoji.tsv lists 2 to {len(lines)}")
    return tuple(Emoji(*line.split("\t")) for line in lines[:count])


def concepts(model: Path) -> tuple[Emoji, ...]:
    """What the model in that folder can draw: its ``names.txt`` lists the first of ``emoji.tsv``."""
    return load(len((model / "names.txt").read_text(encoding="utf-8").splitlines()))


def draw(rng: np.random.Generator, emoji: tuple[Emoji, ...], held_out: bool = False) -> Scene:
    """A random scene: 45 % large, 15 % in a corner, 40 % pairs; two of five backgrounds white.

    That is before those that are not of the wanted kind are thrown away. What is trained on is half large, a third
    pairs, and nearly half white.
    """
    colours = list(COLOURS)
    while True:
        kind = rng.random()
        colour = "white" if rng.random() < 0.4 else colours[rng.integers(1, len(colours))]
        first, second = (emoji[i] for i in rng.choice(len(emoji), 2, replace=False))
        if kind < 0.45:
            scene = Scene((first,), colour)
        elif kind < 0.60:
            scene = Scene((first,), colour, list(CORNERS)[rng.integers(len(CORNERS))])
        else:
            scene = Scene((first, second), colour, list(RELATIONS)[rng.integers(len(RELATIONS))])
        if scene.held_out == held_out:
            return scene
