from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from rt.sheet import GAP, PAGE, sheet


def solid(width: int, height: int, colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


@pytest.mark.parametrize(
    ("size", "drawn"),
    [((64, 64), (128, 128)), ((512, 512), (256, 256)), ((200, 150), (200, 150)), ((512, 256), (256, 128))],
)
def test_pictures_are_scaled_into_the_page_in_order(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250), (250, 0, 250), (9, 9, 9)]
    page = sheet([solid(*size, colour) for colour in colours], [f"number {i}" for i in range(7)])
    columns = min(7, (PAGE - GAP) // (drawn[0] + GAP))
    assert page.width == columns * (drawn[0] + GAP) + GAP <= PAGE
    pixels = np.asarray(page)
    rows = -(-7 // columns)
    cell = (page.height - GAP) // rows
    for i, colour in enumerate(colours):
        x, y = GAP + i % columns * (drawn[0] + GAP), GAP + i // columns * cell
        inside = pixels[y : y + drawn[1], x : x + drawn[0]]
        assert (inside == colour).all()
        below = pixels[y + drawn[1] + 1 : y + cell, x : x + drawn[0]]
        assert below.min() < 100 and below.max() == 255  # its caption, in black on white


def test_long_prompts_end_within_three_lines() -> None:
    short, long = (sheet([solid(64, 64, (0, 0, 0))], [text]) for text in ("a", "word " * 200))
    assert long.height == short.height + 2 * 17
    unbroken = sheet([solid(64, 64, (0, 0, 0))], ["x" * 500])
    assert unbroken.size == short.size


def test_pictures_and_captions_pair_up() -> None:
    with pytest.raises(ValueError, match="shorter"):
        sheet([solid(64, 64, (0, 0, 0))] * 2, ["one"])
