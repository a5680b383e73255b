"""One picture of a report: how long each stage takes, and how the time of a whole call scatters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rt.bench.report import Report, Stage

_SIZE_INCHES, _DPI = (11, 4.2), 150
_BAR, _WHISKER = "#4c78a8", "#222222"
_MARKS = {50: "#f2b701", 90: "#e68310", 99: "#b22222"}


def draw(report: Report, path: Path) -> None:
    """Write a PNG of 1650 x 630 pixels."""
    *engines, whole = report.stages
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    figure.suptitle(_title(report), fontsize=11)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _bars(left, engines)
    _distribution(right, whole)
    figure.savefig(path, dpi=_DPI, format="png")


def _title(report: Report) -> str:
    settings, machine = report.settings, report.provenance.machine
    how = f"{settings.steps} steps, guidance {settings.guidance_scale:g}"
    return f"{report.subject}\n{how}; {machine.processor}, {report.calibration}"


def _bars(axes: Axes, stages: list[Stage]) -> None:
    """Medians with a whisker to the 90th percentile."""
    median = np.array([stage.samples.median for stage in stages]) * 1e3
    p90 = np.array([stage.samples.p90 for stage in stages]) * 1e3
    axes.barh([stage.name for stage in stages], median, height=0.6, color=_BAR)
    axes.errorbar(
        median, range(len(stages)), xerr=(0 * median, p90 - median), fmt="none", ecolor=_WHISKER, capsize=4
    )
    for row, (bar, whisker) in enumerate(zip(median, p90, strict=True)):
        axes.annotate(f"{bar:.3g}", (whisker, row), (8, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * p90.max())
    axes.set_xlabel("ms a call (whisker: 90th percentile)")
    axes.set_title("Each engine alone, median")
    axes.spines[["top", "right"]].set_visible(False)


def _distribution(axes: Axes, whole: Stage) -> None:
    """The share of calls that were done by then."""
    ms = 1e3 * np.array(whole.samples.seconds)
    axes.ecdf(ms, color=_BAR, linewidth=2)
    for percent, colour in _MARKS.items():
        at = whole.samples.percentile(percent) * 1e3
        axes.plot(at, percent / 100, "o", markersize=8, color=colour, label=f"p{percent}: {at:.4g} ms")
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("ms from prompt to picture")
    axes.set_ylabel("share of calls done")
    axes.set_title(f"End to end, {len(ms)} calls, {whole.pictures_per_s:.3g} images/s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", framealpha=1, edgecolor="white")
