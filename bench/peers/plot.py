"""Pictures of the comparisons in `bench/results/`: `python -m rt.bench.peers.plot` in a checkout.

One SVG a model and machine, `docs/peers-MODEL-MACHINE.svg`, of the figures that `docs/benchmarks.md` has in tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rt.bench.peers.peer import MEASURES, PICTURE, STEP, TEXT, UNET, VAE
from rt.bench.peers.table import Line, Section, sections
from rt.bench.record import RESULTS, read
from rt.machine import Machine

DOCS = RESULTS.parents[1] / "docs"
_OURS, _ANCHOR, _OTHERS = "#e68310", "#3a3a3a", "#4c78a8"
_WIDTH_INCHES, _ROW_INCHES = 11, 0.3

Value = Callable[[Line], "float | None"]


def draw(section: Section, path: Path) -> None:
    """Write an SVG: bars from zero, ours in orange, the anchor dark; what was not measured says so."""
    panels = _panels(section)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    height = rows * (1.1 + _ROW_INCHES * len(section.lines)) + 0.6
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    figure.suptitle(section.heading().replace("**", "").replace(", with", "\nwith", 1), fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for place, (title, value) in zip(axes.flat, panels.items(), strict=False):
        _bars(place, section, title, value)
    for place in axes.flat[len(panels) :]:
        place.set_axis_off()
    with matplotlib.rc_context({"svg.hashsalt": "rt"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def _panels(section: Section) -> dict[str, Value]:
    """Title with unit → what it shows; of the pictures those of most steps."""
    pictures = [column for column in section.columns if column.startswith(MEASURES[PICTURE])]
    columns = [MEASURES[UNET], *([] if MEASURES[UNET] in section.columns else [MEASURES[STEP]])]
    columns += [MEASURES[VAE], *pictures[-1:], MEASURES[TEXT]]
    panels: dict[str, Value] = {
        f"{column}, {_unit(section, column)[1]}": _median(column, _unit(section, column)[0])
        for column in columns
        if column in section.columns
    }
    if MEASURES[UNET] in section.columns:
        panels["error of the U-Net, relative L2"] = lambda line: line.figures.get(MEASURES[UNET], {}).get(
            "error"
        )
    panels["peak memory, GiB"] = lambda line: max(line.row["load_mib"], line.row["steady_mib"]) / 1024
    return panels


def _unit(section: Section, column: str) -> tuple[float, str]:
    slowest = max(
        line.figures[column]["median_s"] for line in section.lines.values() if column in line.figures
    )
    return (1.0, "s") if slowest >= 1 else (1e3, "ms")


def _median(column: str, scale: float) -> Value:
    def value(line: Line) -> float | None:
        return line.figures[column]["median_s"] * scale if column in line.figures else None

    return value


def _bars(axes: Axes, section: Section, title: str, value: Value) -> None:
    names = list(section.lines)
    values = [value(line) for line in section.lines.values()]
    colours = [_colour(section, name) for name in names]
    axes.barh(names, [each or 0.0 for each in values], height=0.65, color=colours)
    for row, each in enumerate(values):
        label = (
            "not measured" if each is None else f"{each:.3g}" if each >= 1e-4 or not each else f"{each:.0e}"
        )
        axes.annotate(label, (each or 0.0, row), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.18 * max(each or 0.0 for each in values))
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _colour(section: Section, name: str) -> str:
    if name == section.anchor:
        return _ANCHOR
    return _OURS if section.lines[name].row["ours"] else _OTHERS


def file_name(section: Section) -> str:
    """Of the picture."""
    model = re.sub(r"[^a-z0-9]+", "-", section.model.lower())
    return f"peers-{model}-{Machine.from_json(section.machine).kind}.svg"


def update(docs: Path = DOCS, results: Path = RESULTS) -> None:
    """Draw all sections into `docs`."""
    for section in sections(read(results)):
        draw(section, docs / file_name(section))


if __name__ == "__main__":
    update()
