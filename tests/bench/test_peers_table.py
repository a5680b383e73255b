"""Tables and plots of comparisons: what is newest, what is pooled, what is left empty."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from rt.bench.peers.comparison import Comparison, Figure, Row
from rt.bench.peers.plot import draw, file_name
from rt.bench.peers.table import lines, render, sections
from rt.bench.timing import Samples

MACHINE = {"system": "x", "processor": "abacus", "cores": 2, "memory_gib": 1.5, "features": []}


def row(name: str, group: int = 0, error: float = 0.0123, **figures: tuple[float, ...]) -> Row:
    return Row(
        name=name,
        ours=name.startswith("rt"),
        group=group,
        versions={},
        ready_s=3.21,
        load_mib=1024.0,
        steady_mib=512.0,
        figures={
            measure: Figure(
                samples=Samples(seconds), ratio=seconds[0] / 2, error=error if measure == "unet" else None
            )
            for measure, seconds in figures.items()
        },
    )


def record(
    *rows: Row, date: str = "2020-01-01", steps: int = 20, model: str = "m", **more: Any
) -> dict[str, Any]:
    comparison = Comparison(
        model=model,
        size=64,
        steps=steps,
        threads=2,
        seed=1,
        anchor="by hand",
        gemm_gflops=((100.0, 120.0),),
        rows=rows,
        absent=more.pop("absent", {}),
    )
    return {"provenance": {"date": date, "machine": {**MACHINE, **more}}, "peers": comparison.to_json()}


def cells(text: str, name: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if f"| {name} |" in line
    ]


def test_a_table_has_times_with_ratios_then_errors_and_memory() -> None:
    text = render([record(row("by hand", unet=(2.0,)), row("rt", error=0.0246, unet=(1.5,), text=(0.01,)))])
    assert text.startswith("**m**, 64 × 64, with guidance, on abacus, 2 cores, 1.5 GiB, 2020-01-01. ")
    assert "100 to 120 GFLOP/s" in text
    assert "| time (× by hand) | text encoder | U-Net |" in text
    assert "| error (× by hand), memory | U-Net | peak while loading | peak after | ready |" in text
    assert cells(text, "rt") == [
        ["rt", "10 ms (0.01)", "1.50 s (0.75)"],
        ["rt", "2.5e-02 (2)", "1.00 GiB", "0.50 GiB", "3.2 s"],
    ]
    assert cells(text, "by hand")[0] == ["by hand", "", "2.00 s (1.00)"]


def test_the_anchor_of_several_groups_is_one_line_of_all_its_samples() -> None:
    text = render(
        [record(row("by hand", unet=(2.0, 2.0)), row("by hand", group=1, unet=(2.0, 8.0, 8.0, 8.0)))]
    )
    assert cells(text, "by hand")[0][1] == "5.00 s (1.00)"


def test_a_newer_figure_replaces_an_older_one_of_that_candidate_and_measure_only() -> None:
    old = record(row("by hand", unet=(2.0,)), row("rt", unet=(1.5,), vae=(4.0,)), row("gone", unet=(3.0,)))
    new = record(row("by hand", unet=(6.0,)), row("rt", unet=(5.0,)), date="2020-01-02")
    text = render([old, new])
    assert "2020-01-01 and 2020-01-02" in text
    assert cells(text, "by hand")[0][1] == "6.00 s (3.00)"
    assert cells(text, "rt")[0] == ["rt", "5.00 s (2.50)", "4.00 s (2.00)"]
    assert cells(text, "gone")[0] == ["gone", "3.00 s (1.50)", ""]


def test_pictures_of_other_steps_are_another_column() -> None:
    text = render(
        [record(row("by hand", picture=(9.0,)), steps=20), record(row("by hand", picture=(3.0,)), steps=4)]
    )
    assert "| time (× by hand) | picture, 4 steps | picture, 20 steps |" in text
    assert cells(text, "by hand")[0] == ["by hand", "3.00 s (1.50)", "9.00 s (4.50)"]


def test_other_models_and_machines_are_sections_of_their_own_and_other_records_none() -> None:
    records = [record(row("by hand", unet=(2.0,)), **which) for which in ({}, {"model": "n"}, {"cores": 8})]
    assert [(s.model, s.machine["cores"]) for s in sections([*records, {"provenance": {}}])] == [
        ("m", 2),
        ("n", 2),
        ("m", 8),
    ]


def test_a_terminal_also_hears_who_is_absent() -> None:
    printed = list(lines(record(row("by hand", unet=(2.0,)), absent={"genai": "genai needs a package"})))
    assert printed[-1] == "absent: genai needs a package"


def test_the_plot_has_a_bar_for_each_figure_from_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = np.random.default_rng().uniform(1, 9, 2)
    [section] = sections(
        [record(row("by hand", unet=(seconds[0],)), row("rt", unet=(seconds[1],), vae=(4.0,)))]
    )
    figures: list[Any] = []
    original = pytest.importorskip("matplotlib.figure").Figure.savefig

    def keep(figure: Any, *arguments: Any, **keywords: Any) -> None:
        figures.append(figure)
        original(figure, *arguments, **keywords)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep)
    path = tmp_path / file_name(section)
    draw(section, path)
    assert path.name == "peers-m-abacus.svg"
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
    panels = {axes.get_title(): axes for axes in figures[0].axes if axes.axison}
    assert list(panels) == [
        "U-Net, s",
        "VAE decoder, s",
        "error of the U-Net, relative L2",
        "peak memory, GiB",
    ]
    widths = [bar.get_width() for bar in panels["U-Net, s"].patches]
    assert widths == pytest.approx(seconds)
    assert all(axes.get_xlim()[0] == 0 for axes in panels.values())
    assert [text.get_text() for text in panels["VAE decoder, s"].texts] == ["not measured", "4"]
