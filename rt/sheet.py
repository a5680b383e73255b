"""Several pictures on one page, each above its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageFont

SIDE, PAGE = (128, 256), 860
"""Shortest and longest side of a picture on the page, and the page's width at most, in pixels."""
GAP, TEXT_PX, LINES = 12, 13, 3


def sheet(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Pictures of one size row by row on white, scaled into `SIDE`; a caption takes three lines at most."""
    from PIL import Image, ImageDraw, ImageFont

    first = pictures[0]
    scale = min(max(SIDE[0] / min(first.size), 1), SIDE[1] / max(first.size))
    width, height = (round(scale * extent) for extent in first.size)
    font = ImageFont.load_default(TEXT_PX)
    texts = ["\n".join(_wrap(caption, width, font)) for caption in captions]
    line = TEXT_PX + 4
    cell = height + line * max(text.count("\n") + 1 for text in texts) + GAP
    columns = min(len(pictures), max(1, (PAGE - GAP) // (width + GAP)))
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (width + GAP) + GAP, rows * cell + GAP), "white")
    pen = ImageDraw.Draw(page)
    for index, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x, y = GAP + index % columns * (width + GAP), GAP + index // columns * cell
        page.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (x, y))
        pen.multiline_text((x, y + height + 2), text, "black", font, spacing=line - TEXT_PX)
    return page


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], f"{lines[LINES - 1]} …"]
