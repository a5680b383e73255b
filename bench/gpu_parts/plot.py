"""Pictures of the GPU's records in `bench/results/`: `python -m rt.bench.gpu_parts.plot` in a checkout.

One SVG a GPU, `docs/gpu-GPU.svg`: the times of every model's parts and pictures, and each kernel against torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rt.bench.gpu_parts.figures import best_alternative
from rt.bench.gpu_parts.part import Figures
from rt.bench.gpu_parts.parts import PARTS
from rt.bench.gpu_parts.record import Gpu, Outcome
from rt.bench.gpu_parts.settings import OURS, measure_name
from rt.bench.gpu_parts.table import newest_parts
from rt.bench.record import RESULTS, read

DOCS = RESULTS.parents[1] / "docs"
_OURS, _OTHERS, _EVEN = "#e68310", "#4c78a8", "#3a3a3a"
_WIDTH_INCHES, _ROW_INCHES, _COLUMNS = 11, 0.3, 3

Bars = Mapping[str, float]


def draw(gpu: Gpu, parts: Mapping[str, Outcome], path: Path) -> None:
    """Write an SVG: bars from zero, ours in orange; none where nothing was measured that it shows."""
    panels = _panels(parts)
    if not panels:
        return
    rows = -(-len(panels) // _COLUMNS)
    tallest = max(len(bars) for bars in panels.values())
    figure = Figure(figsize=(_WIDTH_INCHES, rows * (0.9 + _ROW_INCHES * tallest) + 0.4), layout="constrained")
    figure.suptitle(gpu.name, fontsize=10)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False)
    for place, (title, bars) in zip(axes.flat, panels.items(), strict=False):
        _bars(place, title, bars)
    for place in axes.flat[len(panels) :]:
        place.set_axis_off()
    with matplotlib.rc_context({"svg.hashsalt": "rt"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def _panels(parts: Mapping[str, Outcome]) -> dict[str, Bars]:
    """Title with unit → name → value."""
    panels: dict[str, Bars] = {}
    for part in PARTS:
        outcome = parts.get(part.name)
        if part.module == "models" and outcome is not None:
            panels |= _model(part.title, outcome.figures)
    if "timings" in parts:
        panels["kernels: best of torch, × the time of ours"] = _kernels(parts["timings"].figures)
    return {title: bars for title, bars in panels.items() if bars}


def _model(title: str, figures: Figures) -> dict[str, Bars]:
    candidates = figures["candidates"]
    measures = dict.fromkeys(name for row in candidates.values() for name in row["measures"])
    return {
        f"{title}:\n{measure_name(measure)}, ms": {
            name: 1e3 * row["measures"][measure]["median_s"]
            for name, row in candidates.items()
            if measure in row["measures"]
        }
        for measure in measures
    }


def _kernels(figures: Figures) -> Bars:
    """Of the largest workload of each, which comes first."""
    largest = {row["kernel"]: row for row in reversed(figures["workloads"]) if row["times"]}
    ratios = {name: best_alternative(row)[1] for name, row in sorted(largest.items())}
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def _bars(axes: Axes, title: str, bars: Bars) -> None:
    kernels = title.startswith("kernels")
    colours = [_OURS if kernels or name.startswith(OURS) else _OTHERS for name in bars]
    axes.barh([*bars], [*bars.values()], height=0.65, color=colours)
    for row, value in enumerate(bars.values()):
        axes.annotate(
            f"{value:.3g}", (value, row), (3, 0), textcoords="offset points", va="center", fontsize=8
        )
    if kernels:
        axes.axvline(1, color=_EVEN, linewidth=1)
    axes.set_xlim(0, 1.18 * max(bars.values()))
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)


def update(docs: Path = DOCS, results: Path = RESULTS) -> None:
    """Draw all GPUs into `docs`."""
    for found in newest_parts(read(results)):
        draw(found.gpu, found.parts, docs / f"gpu-{found.gpu.kind}.svg")


if __name__ == "__main__":
    update()
