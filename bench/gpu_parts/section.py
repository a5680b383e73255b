"""A table, for a terminal in 80 columns and for a document."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rt.bench.markdown import table

Rows = list[tuple[str, ...]]
WIDTH, _LONGEST = 80, 28


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        title: Above it.
        head: Its columns, the first of names.
        rows: As many cells in each.
        note: Below it, may be "".
    """

    title: str
    head: tuple[str, ...]
    rows: Rows
    note: str = ""

    def markdown(self) -> str:
        """For a document."""
        parts = [f"**{self.title}**", table(self.head, self.rows), self.note]
        return "\n\n".join(part for part in parts if part)

    def text(self) -> str:
        """For a terminal: columns beyond 80 characters follow below, with the names again."""
        names, *others = (
            [_cut(cell) for cell in column] for column in zip(self.head, *self.rows, strict=True)
        )
        blocks = [[names]]
        for column in others:
            if sum(_width(each) + 2 for each in blocks[-1]) + _width(column) > WIDTH:
                blocks.append([names])
            blocks[-1].append(column)
        parts = ["\n".join(_lines(block)) for block in blocks]
        return "\n".join([self.title, *parts, *([textwrap.fill(self.note, WIDTH)] if self.note else [])])


def _cut(cell: str) -> str:
    return cell if len(cell) <= _LONGEST else f"{cell[: _LONGEST - 1]}…"


def _width(column: Sequence[str]) -> int:
    return max(map(len, column))


def _lines(columns: Sequence[Sequence[str]]) -> Iterator[str]:
    """Names to the left, all else to the right."""
    for name, *cells in zip(*columns, strict=True):
        aligned = [f"{cell:>{_width(column)}}" for cell, column in zip(cells, columns[1:], strict=True)]
        yield "  ".join([f"{name:<{_width(columns[0])}}", *aligned]).rstrip()
